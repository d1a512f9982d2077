"""What the benchmarks of `moeport bench` share: their options, their job, and where the figures go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moeport.backends.base import Backend
    from moeport.comm.communicator import Communicator
    from moeport.launch.launcher import Launch

HOW = """bench {name} runs in the processes of a job, and this process was started by itself; start it with one of
  torchrun --nproc-per-node 2 -m moeport bench {name}
  msrun --worker_num 2 --local_worker_num 2 --join True --log_dir logs python -m moeport bench {name}
  moeport emulate --nodes 2 --ranks-per-node 2 --inter 1gbit -- bench {name}"""
PLAIN_WIDTH = 180
"""Characters of a line where the output is no terminal: no column is cut off."""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Minimum = Annotated[str, typer.Option("--minbytes", "-b", help="Smallest size, such as 64K.")]
Maximum = Annotated[str, typer.Option("--maxbytes", "-e", help="Largest size, such as 16M.")]
Factor = Annotated[int, typer.Option("--stepfactor", "-f", min=2, help="Ratio of one size to the next.")]
Repetitions = Annotated[int, typer.Option("--iters", "-n", min=1, help="Timed runs of each.")]
Warmup = Annotated[int, typer.Option("--warmup-iters", "-w", min=0, help="Untimed runs before.")]
Check = Annotated[int, typer.Option("--check", "-c", min=0, max=1, help="1: compare all values.")]
Chunks = Annotated[str, typer.Option(help="Parts of the tokens that take turns, such as 1,2,4.")]
DType = Literal["float32", "bfloat16", "float64"]
BackendName = Annotated[
    str | None, typer.Option("--backend", help="torch or mindspore; default: that of the launcher.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or npu.")]
Timeout = Annotated[float, typer.Option(help="Seconds that a collective may take.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures here.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write all figures here.")]


def started(name: str) -> Launch:
    """The job that this process is of. Raises UserError for a process started by itself."""
    from moeport.errors import UserError
    from moeport.launch.launcher import launched

    launch = launched()
    if launch is None:
        raise UserError(HOW.format(name=name))
    return launch


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for a name that is not known."""
    from moeport.errors import UserError

    for name in names:
        if name not in known:
            raise UserError(f"{what} {name!r} is not one; expected {', '.join(known)}")


def check_experts(experts: int, ranks: int) -> None:
    """Raises UserError if the experts do not divide among the ranks."""
    from moeport.errors import UserError

    if experts % ranks:
        raise UserError(f"--experts {experts}: do not divide among {ranks} ranks; expected a multiple of {ranks}")


def about(communicator: Communicator, backend: Backend) -> dict[str, Any]:
    """What figures were measured on."""
    import os

    from moeport.launch.emulation import EMULATED

    return {
        "backend": backend.name,
        "device": backend.device,
        "versions": backend.versions(),
        "ranks": communicator.size,
        "nodes": list(communicator.nodes),
        "emulated": EMULATED in os.environ,
    }


def ranks_in_words(communicator: Communicator, backend: Backend) -> str:
    """Where it runs."""
    nodes = len(set(communicator.nodes))
    return f"{backend.name} on {backend.device}: {communicator.size} ranks on {nodes} node{'s'[: nodes > 1]}"


def wide_console() -> Console:
    """A console that cuts no column off where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def sizes(minimum: str, maximum: str, factor: int) -> list[int]:
    """Bytes, from the smallest by the factor to the largest. Raises UserError for words that are no size."""
    first, last = _bytes(minimum), _bytes(maximum)
    found = [first]
    while found[-1] * factor <= last:
        found.append(found[-1] * factor)
    return found


def _bytes(text: str) -> int:
    from moeport.errors import UserError

    digits, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not digits.isdigit() or unit not in UNITS or int(digits) == 0:
        raise UserError(f"size {text!r} is not one; expected bytes such as 4096, 64K, 4M or 1G")
    return int(digits) * UNITS[unit]


def numbers_of_chunks(text: str) -> list[int]:
    """Of `1,2,4`. Raises UserError for other texts."""
    from moeport.errors import UserError

    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--chunks {text!r}: expected numbers of at least 1 such as 1,2,4")
    return [int(word) for word in words]
