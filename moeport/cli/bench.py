"""`moeport bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeport.cli import bench_moe
from moeport.cli.bench_job import (
    BackendName,
    Check,
    Chunks,
    CsvFile,
    Device,
    DType,
    Factor,
    JsonFile,
    Maximum,
    Minimum,
    Repetitions,
    Timeout,
    Warmup,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moeport.backends.base import Backend
    from moeport.bench.operations import Measured, Traffic
    from moeport.comm.communicator import Communicator
    from moeport.comm.exchange import ExpertExchange

app = typer.Typer(name="bench", help="Benchmarks of the cluster.", no_args_is_help=True)
app.command("moe")(bench_moe.moe)

OPERATIONS = "all_reduce, all_gather, reduce_scatter, broadcast, sendrecv, all_to_all; flat, hierarchical, node_dedup"


@app.callback()
def _bench() -> None:
    """Benchmarks of the cluster."""


@app.command("comm")
def comm(
    operations: Annotated[
        list[str] | None, typer.Argument(help=f"Which; default: all of {OPERATIONS}.", show_default=False)
    ] = None,
    minimum: Minimum = "64K",
    maximum: Maximum = "4M",
    factor: Factor = 4,
    repetitions: Repetitions = 10,
    warmup: Warmup = 2,
    check: Check = 1,
    dtype: Annotated[DType, typer.Option("--datatype", "-d", help="Type of the elements.")] = "float32",
    traffic: Annotated[
        str, typer.Option(help="Experts of the tokens: uniform, zipf, local:F, or a .npy file of ids (tokens, K).")
    ] = "uniform",
    experts: Annotated[int, typer.Option(min=1, help="Experts of the expert exchanges.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Numbers of a token.")] = 256,
    backward: Annotated[bool, typer.Option("--backward", help="Expert exchanges forward and backward.")] = False,
    chunks: Chunks = "1",
    backend: BackendName = None,
    device: Device = "auto",
    timeout: Timeout = 120.0,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw bandwidth over size here, .png, .svg or .pdf; needs matplotlib.")
    ] = None,
) -> None:
    """Time collectives and all-to-alls of experts, and check their values, under torchrun or msrun.

    Columns and flags are those of nccl-tests. Times are medians of the slowest rank. The size of an expert exchange
    (flat, hierarchical, node_dedup) is that of one rank's tokens before they are copied to their experts; its time is
    that of the way there and back, with its tokens whole or in chunks.
    """
    from moeport.backends import get_backend
    from moeport.bench.measure import measure
    from moeport.bench.operations import Traffic
    from moeport.bench.output import Row, table, write_csv, write_json, write_plot
    from moeport.cli.bench_job import about, numbers_of_chunks, ranks_in_words, sizes, started, wide_console
    from moeport.comm.exchange import EXCHANGES
    from moeport.config import config_from_dict

    launch = started("comm")
    wanted_sizes = sizes(minimum, maximum, factor)
    wanted_chunks = numbers_of_chunks(chunks)
    wanted = _known(operations or [], launch.size, experts, top_k)
    name = backend or launch.backend
    chosen = get_backend(config_from_dict({"backend": {"name": name, "device": device, "dtype": dtype}}).backend)
    with chosen.communicator(launch, timeout) as communicator:
        moe = Traffic(traffic, top_k, width, backward)
        exchanges = {
            name: [EXCHANGES[name](communicator, experts, number) for number in wanted_chunks]
            for name in wanted
            if name in EXCHANGES
        }
        carrying = [each for same in exchanges.values() for exchange in same for each in exchange.communicators]
        communicators = list(dict.fromkeys([communicator, *carrying]))
        rows: list[Row] = []
        for size in wanted_sizes:
            ready = _prepared(wanted, exchanges, communicator, chosen, dtype, size, moe)
            taken = measure(
                [operation for _, operation in ready],
                communicators,
                chosen.ops,
                warmup=warmup,
                repetitions=repetitions,
                check=bool(check),
            )
            rows += [Row.of(*named, times) for named, times in zip(ready, taken, strict=True)]
        if communicator.rank == 0:
            console = wide_console()
            console.print(
                f"{ranks_in_words(communicator, chosen)}; expert exchanges: {experts} experts, top-{top_k}, {traffic}, "
                f"tokens of {width}{', forward and backward' if backward else ''}"
            )
            console.print(table(rows))
            if json_file:
                tokens = {"traffic": traffic, "experts": experts, "top_k": top_k, "width": width, "backward": backward}
                write_json(json_file, about(communicator, chosen) | tokens, rows)
            if csv_file:
                write_csv(csv_file, rows)
            if plot_file:
                write_plot(plot_file, rows)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def _known(names: list[str], ranks: int, experts: int, top_k: int) -> list[str]:
    """The operations, all if none is named; UserError for what cannot be run."""
    from moeport.bench.operations import COLLECTIVES
    from moeport.cli.bench_job import check_experts, check_names
    from moeport.comm.exchange import EXCHANGES
    from moeport.errors import UserError

    known = [*COLLECTIVES, *EXCHANGES]
    check_names("operation", names, known)
    check_experts(experts, ranks)
    if top_k > experts:
        raise UserError(f"--top-k {top_k}: more experts per token than there are; expected at most {experts}")
    return names or known


def _prepared(
    names: Sequence[str],
    exchanges: Mapping[str, Sequence[ExpertExchange]],
    communicator: Communicator,
    backend: Backend,
    dtype: str,
    size: int,
    traffic: Traffic,
) -> list[tuple[str, Measured]]:
    """Every operation at one size; exchanges in each number of chunks."""
    from moeport.bench.operations import collective, expert_exchange
    from moeport.comm.communicator import ITEM_BYTES
    from moeport.model.auto_exchange import label

    item_bytes = ITEM_BYTES[dtype]
    found: list[tuple[str, Measured]] = []
    for name in names:
        if name in exchanges:
            found += [
                (label(name, exchange.chunks), expert_exchange(exchange, backend, dtype, item_bytes, size, traffic))
                for exchange in exchanges[name]
            ]
        else:
            found.append((name, collective(name, communicator, backend.ops, dtype, item_bytes, size)))
    return found
