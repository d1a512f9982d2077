"""`moeport probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moeport.facts import BACKENDS, DEVICES, training_backends

if TYPE_CHECKING:
    from rich.table import Table

    from moeport.backends.base import Backend
    from moeport.comm.check import CheckedCollective
    from moeport.comm.communicator import Communicator
    from moeport.comm.job import Job
    from moeport.launch.launcher import Launch

HOW = """probe runs in the processes of a job, and this process was started by itself; start it with one of
  torchrun --nproc-per-node 2 -m moeport probe
  msrun --worker_num 2 --local_worker_num 2 --join True --log_dir logs python -m moeport probe"""


def probe(
    backend: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(training_backends())}; default: the launcher's.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help=f"{', '.join(('auto', *DEVICES))}.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Timeout of a collective in seconds.")] = 60.0,
) -> None:
    """Check the values of every collective among the ranks of a job."""
    from moeport.bench.options import Target
    from moeport.errors import UserError
    from moeport.launch.launcher import launched

    launch = launched()
    if launch is None:
        raise UserError(HOW)

    from moeport.backends import join_job
    from moeport.config import config_from_dict
    from moeport.training.agreed import of_backend, of_command

    Target(backend, device, timeout).check(BACKENDS)
    name = backend or launch.backend
    target = config_from_dict({"backend": {"name": launch.backend, "device": device}}).backend
    with join_job(launch, timeout, target) as job:
        job.agree(*of_command("probe", name, {"--backend": name, "--device": device, "--timeout": timeout}))
        chosen, dtypes = _backend(name, device)
        job.agree(of_backend(chosen))
        _check(chosen, launch, timeout, job, dtypes)


def _check(chosen: Backend, launch: Launch, timeout: float, job: Job, dtypes: list[str]) -> None:
    """Run every collective, and print the results on the first rank."""
    with chosen.communicator(launch, timeout, job) as communicator:
        replaced = _replaced(chosen, communicator, dtypes)
        results = _probe(chosen, communicator, dtypes)
        if communicator.rank == 0:
            from moeport.pages.console import PlainConsole

            nodes = len(set(communicator.nodes))
            console = PlainConsole()
            console.print(
                f"{chosen.name} on {chosen.device}: {communicator.size} ranks on {nodes} node{'s'[: nodes > 1]}"
            )
            if replaced:
                console.print(replaced, markup=False, soft_wrap=True)
            console.print(_table(results))
            console.print(f"every value is right{', with sends and receives' if replaced else ''}")


def _backend(name: str, device: str) -> tuple[Backend, list[str]]:
    """The backend and the types it computes in."""
    from moeport.backends import get_backend
    from moeport.config import config_from_dict
    from moeport.core.ops import FLOAT_DTYPES
    from moeport.errors import BackendUnavailableError, UserError

    found: dict[str, Backend] = {}
    problem: UserError | None = None
    for dtype in FLOAT_DTYPES:
        try:
            config = config_from_dict({"backend": {"name": name, "device": device, "dtype": dtype}})
            found[dtype] = get_backend(config.backend)
        except UserError as error:
            problem = error
    if not found:
        raise problem or BackendUnavailableError(f"backend {name} computes in no type")
    return found[next(iter(found))], [*found, "index"]


def _replaced(backend: Backend, communicator: Communicator, dtypes: list[str]) -> str | None:
    """What takes the place of an all-to-all that delivers wrong values; decided as when a job starts."""
    from moeport.comm.start import check_start

    return check_start(communicator, dtypes, backend.value_and_grad if backend.trains else None, backend.versions())


def _probe(backend: Backend, communicator: Communicator, dtypes: list[str]) -> list[tuple[str, CheckedCollective]]:
    """Results among all ranks and, if there are at least four, among groups of every second rank."""
    from moeport.comm.check import check_collectives as check

    grad = backend.value_and_grad if backend.trains else None
    versions = backend.versions()
    results = [("all", result) for result in check(communicator, dtypes, grad, versions=versions)]
    if communicator.size >= 4:
        group = communicator.group([communicator.ranks[::2], communicator.ranks[1::2]])
        results += [("every second", result) for result in check(group, dtypes, grad, versions=versions)]
    return results


def _table(results: list[tuple[str, CheckedCollective]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("collective", "type", "ranks", "result"):
        table.add_column(heading)
    table.add_column("bytes sent by rank 0", justify="right")
    for ranks, result in results:
        table.add_row(result.collective, result.dtype, ranks, "right", f"{result.sent_bytes:,}")
    return table
