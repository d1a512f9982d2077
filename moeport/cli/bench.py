"""`moeport bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from moeport.backends.base import Backend
    from moeport.bench.operations import Measured, Traffic
    from moeport.comm.communicator import Communicator

    Prepare = Callable[[int], list[tuple[str, Measured]]]

app = typer.Typer(name="bench", help="Benchmarks of the cluster.", no_args_is_help=True)

HOW = """bench comm runs in the processes of a job, and this process was started by itself; start it with one of
  torchrun --nproc-per-node 2 -m moeport bench comm
  msrun --worker_num 2 --local_worker_num 2 --join True --log_dir logs python -m moeport bench comm
  moeport emulate --nodes 2 --ranks-per-node 2 --inter 1gbit -- bench comm"""
PLAIN_WIDTH = 180
"""Characters of a line where the output is no terminal: no column is cut off."""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
OPERATIONS = "all_reduce, all_gather, reduce_scatter, broadcast, sendrecv, all_to_all; flat, hierarchical, node_dedup"


@app.callback()
def _bench() -> None:
    """Benchmarks of the cluster."""


@app.command("comm")
def comm(
    operations: Annotated[
        list[str] | None, typer.Argument(help=f"Which; default: all of {OPERATIONS}.", show_default=False)
    ] = None,
    minimum: Annotated[str, typer.Option("--minbytes", "-b", help="Smallest size, such as 64K.")] = "64K",
    maximum: Annotated[str, typer.Option("--maxbytes", "-e", help="Largest size, such as 16M.")] = "4M",
    factor: Annotated[int, typer.Option("--stepfactor", "-f", min=2, help="Ratio of one size to the next.")] = 4,
    repetitions: Annotated[int, typer.Option("--iters", "-n", min=1, help="Timed runs of each.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup-iters", "-w", min=0, help="Untimed runs before.")] = 2,
    check: Annotated[int, typer.Option("--check", "-c", min=0, max=1, help="1: compare all values.")] = 1,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"], typer.Option("--datatype", "-d", help="Type of the elements.")
    ] = "float32",
    traffic: Annotated[
        str, typer.Option(help="Experts of the tokens: uniform, zipf, local:F, or a .npy file of ids (tokens, K).")
    ] = "uniform",
    experts: Annotated[int, typer.Option(min=1, help="Experts of the expert exchanges.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Numbers of a token.")] = 256,
    backward: Annotated[bool, typer.Option("--backward", help="Expert exchanges forward and backward.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch or mindspore; default: that of the launcher.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or npu.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that a collective may take.")] = 120.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all figures here.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw bandwidth over size here, .png, .svg or .pdf; needs matplotlib.")
    ] = None,
) -> None:
    """Time collectives and all-to-alls of experts, and check their values, under torchrun or msrun.

    Columns and flags are those of nccl-tests. Times are medians of the slowest rank. The size of an expert exchange
    (flat, hierarchical, node_dedup) is that of one rank's tokens before they are copied to their experts; its time is
    that of the way there and back.
    """
    import os

    from moeport.backends import get_backend
    from moeport.bench.measure import Row, measure
    from moeport.bench.operations import Traffic
    from moeport.comm.emulation import EMULATED
    from moeport.comm.launcher import launched
    from moeport.config import config_from_dict
    from moeport.errors import UserError

    launch = launched()
    if launch is None:
        raise UserError(HOW)
    sizes = _sizes(minimum, maximum, factor)
    wanted = _known(operations or [], launch.size, experts, top_k)
    name = backend or launch.backend
    chosen = get_backend(config_from_dict({"backend": {"name": name, "device": device, "dtype": dtype}}).backend)
    with chosen.communicator(launch, timeout) as communicator:
        moe = Traffic(traffic, top_k, width, backward)
        prepare, communicators = _operations(wanted, communicator, chosen, dtype, experts, moe)
        rows: list[Row] = []
        for size in sizes:
            rows += measure(
                prepare(size),
                communicators,
                chosen.ops,
                warmup=warmup,
                repetitions=repetitions,
                check=bool(check),
            )
        if communicator.rank == 0:
            from rich.console import Console

            from moeport.bench.output import table, write_csv, write_json, write_plot

            nodes = len(set(communicator.nodes))
            console = Console(highlight=False)
            if not console.is_terminal:
                console.width = PLAIN_WIDTH
            console.print(
                f"{name} on {chosen.device}: {communicator.size} ranks on {nodes} node{'s'[: nodes > 1]}; expert "
                f"exchanges: {experts} experts, top-{top_k}, {traffic}, tokens of {width}"
                f"{', forward and backward' if backward else ''}"
            )
            console.print(table(rows))
            about: dict[str, Any] = {
                "backend": name,
                "device": chosen.device,
                "versions": chosen.versions(),
                "ranks": communicator.size,
                "nodes": list(communicator.nodes),
                "emulated": EMULATED in os.environ,
                "traffic": traffic,
                "experts": experts,
                "top_k": top_k,
                "width": width,
                "backward": backward,
            }
            if json_file:
                write_json(json_file, about, rows)
            if csv_file:
                write_csv(csv_file, rows)
            if plot_file:
                write_plot(plot_file, rows)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def _known(names: list[str], ranks: int, experts: int, top_k: int) -> list[str]:
    """The operations, all if none is named; UserError for what cannot be run."""
    from moeport.bench.operations import COLLECTIVES
    from moeport.comm.exchange import EXCHANGES
    from moeport.errors import UserError

    known = [*COLLECTIVES, *EXCHANGES]
    for name in names:
        if name not in known:
            raise UserError(f"operation {name!r} is not one; expected {', '.join(known)}")
    if experts % ranks:
        raise UserError(f"--experts {experts}: do not divide among {ranks} ranks; expected a multiple of {ranks}")
    if top_k > experts:
        raise UserError(f"--top-k {top_k}: more experts a token than there are; expected at most {experts}")
    return names or known


def _operations(
    names: list[str], communicator: Communicator, backend: Backend, dtype: str, experts: int, traffic: Traffic
) -> tuple[Prepare, list[Communicator]]:
    """What prepares the operations of a size, and all communicators that carry their data."""
    from moeport.bench.operations import collective, expert_exchange
    from moeport.comm.communicator import ITEM_BYTES
    from moeport.comm.exchange import EXCHANGES

    exchanges = {name: EXCHANGES[name](communicator, experts) for name in names if name in EXCHANGES}

    def prepare(size: int) -> list[tuple[str, Measured]]:
        item_bytes = ITEM_BYTES[dtype]
        return [
            (name, expert_exchange(exchanges[name], backend, dtype, item_bytes, size, traffic))
            if name in exchanges
            else (name, collective(name, communicator, backend.ops, dtype, item_bytes, size))
            for name in names
        ]

    return prepare, list(
        dict.fromkeys([communicator, *(each for exchange in exchanges.values() for each in exchange.communicators)])
    )


def _sizes(minimum: str, maximum: str, factor: int) -> list[int]:
    first, last = _bytes(minimum), _bytes(maximum)
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes


def _bytes(text: str) -> int:
    from moeport.errors import UserError

    digits, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not digits.isdigit() or unit not in UNITS or int(digits) == 0:
        raise UserError(f"size {text!r} is not one; expected bytes such as 4096, 64K, 4M or 1G")
    return int(digits) * UNITS[unit]
