"""`moeport bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeport.bench.options import (
    ALL,
    FACTOR,
    REDUCTIONS,
    TYPES,
    CommOptions,
    Files,
    LayerOptions,
    LayerShape,
    Runs,
    Sizes,
    Target,
    Tokens,
    Variants,
)
from moeport.cli.options import SET, Flags, check_plot, grouped, output_file
from moeport.facts import DEVICES, training_backends

app = typer.Typer(name="bench", help="Benchmarks of the cluster.", no_args_is_help=True)

COLLECTIVES = "all_reduce, all_gather, reduce_scatter, broadcast, sendrecv, all_to_all"
SMALLER = Sizes(maximum="1M")
"""Sizes for a whole layer, which takes longer than an exchange."""

SizeFlags = Annotated[
    Sizes,
    Flags(
        minimum=typer.Option("--minbytes", "-b", help="Smallest size, such as 64K."),
        maximum=typer.Option("--maxbytes", "-e", help="Largest size, such as 16M."),
        factor=typer.Option(
            "--stepfactor", "-f", min=2, help="Ratio of each size to the one before.", show_default=str(FACTOR)
        ),
        step=typer.Option(
            "--stepbytes",
            "-i",
            help="Instead, the difference of each size and the one before, such as 1M.",
            show_default=False,
        ),
    ),
]
RunFlags = Annotated[
    Runs,
    Flags(
        repetitions=typer.Option("--iters", "-n", min=1, help="Timed runs of each case."),
        warmup=typer.Option("--warmup-iters", "--warmup_iters", "-w", min=0, help="Untimed runs before them."),
        check=typer.Option("--check", "-c", min=0, max=1, help="1: check all values; 0: do not."),
    ),
]
TargetFlags = Annotated[
    Target,
    Flags(
        backend=typer.Option(
            "--backend", help=f"{' or '.join(training_backends())}; default: the launcher's.", show_default=False
        ),
        device=typer.Option(help=f"{', '.join(('auto', *DEVICES))}."),
        timeout=typer.Option(help="Timeout of a collective in seconds."),
    ),
]
TokenFlags = Annotated[
    Tokens,
    Flags(
        traffic=typer.Option(
            help="How tokens choose experts: uniform, zipf, local:F, or a .npy file of ids (tokens, K)."
        ),
        experts=typer.Option(min=1, help="Number of experts in the exchanges."),
        top_k=typer.Option(min=1, help="Experts per token."),
        width=typer.Option(min=1, help="Width of a token."),
        backward=typer.Option("--backward", help="Time exchanges forward and backward."),
    ),
]
VariantFlags = Annotated[
    Variants,
    Flags(
        op=typer.Option("--op", "-o", help=f"Reduction of all_reduce: {', '.join(REDUCTIONS)} or {ALL}."),
        root=typer.Option("--root", "-r", help=f"Rank that broadcasts, or {ALL}."),
    ),
]
LayerFlags = Annotated[
    LayerShape,
    Flags(
        config_file=typer.Option("--config", metavar="CONFIG", help="Take the layer of this YAML config."),
        overrides=SET,
        experts=typer.Option(min=1, help="Number of experts; default: the config's, else 64.", show_default=False),
        top_k=typer.Option(min=1, help="Experts per token; default: the config's, else 8.", show_default=False),
        width=typer.Option(min=1, help="Width of a token; default: the config's, else 256.", show_default=False),
        hidden=typer.Option(min=1, help="Width of an expert; default: the config's, else 128.", show_default=False),
    ),
]
Chunks = Annotated[str, typer.Option(help="Numbers of chunks to divide the tokens into, such as 1,2,4.")]


def _file_flags(quantity: str) -> Flags:
    """Options of `Files`, with a plot of `quantity`."""
    return Flags(
        json_file=output_file("--json", help="Write all figures as JSON."),
        csv_file=output_file("--csv", "--output_file", "-F", help="Write all figures as CSV."),
        plot_file=output_file(
            "--plot", help=f"Plot {quantity} over size as .png, .svg or .pdf; needs matplotlib.", check=check_plot
        ),
    )


@app.callback()
def _bench() -> None:
    """Benchmarks of the cluster."""


@app.command("moe")
@grouped
def moe(
    algorithms: Annotated[
        list[str] | None,
        typer.Argument(
            help="Which of local and the values of comm.algorithm; default: all but auto.",
            show_default=False,
        ),
    ] = None,
    *,
    shape: LayerFlags,
    chunks: Chunks = "1",
    sizes: SizeFlags = SMALLER,
    runs: RunFlags,
    dtype: Annotated[
        str | None,
        typer.Option("--datatype", "-d", help="Compute type; default: the config's, else float32.", show_default=False),
    ] = None,
    traffic: Annotated[
        str, typer.Option(help="How tokens choose experts: by the router, or as in bench comm: uniform, zipf, ...")
    ] = "router",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="No backward pass.")] = False,
    target: TargetFlags,
    files: Annotated[Files, _file_flags("time")],
) -> None:
    """Time one MoE layer with its experts divided among all ranks, and check its values, on the ranks of a job.

    Times the forward and backward pass of router, drops, all-to-all, experts and shared experts, with each all-to-all
    and each number of chunks. `local` is the same layer without an all-to-all: each rank sends the same number of rows
    to its own experts. Times are medians of the slowest rank. Sizes are those of one rank's tokens.
    """
    from moeport.bench.moe import bench_moe

    options = LayerOptions(
        algorithms or [], shape, chunks, sizes, runs, dtype, traffic, not forward_only, target, files
    )
    if not bench_moe(options):
        raise typer.Exit(1)


@app.command("comm")
@grouped
def comm(
    operations: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Which of {COLLECTIVES}, and of the values of comm.algorithm; default: all.", show_default=False
        ),
    ] = None,
    *,
    sizes: SizeFlags,
    runs: RunFlags,
    dtype: Annotated[
        str, typer.Option("--datatype", "-d", help=f"{', '.join(TYPES)}, a name of nccl-tests, or {ALL}.")
    ] = "float32",
    variants: VariantFlags,
    tokens: TokenFlags,
    chunks: Chunks = "1",
    target: TargetFlags,
    files: Annotated[Files, _file_flags("bandwidth")],
) -> None:
    """Time collectives and expert all-to-alls, and check their values, on the ranks of a job.

    Columns and flags follow nccl-tests. Times are medians of the slowest rank. The size of an expert exchange (a value
    of comm.algorithm) is that of one rank's tokens before they are copied to their experts; its time covers the round
    trip, with the tokens in one piece or in chunks.
    """
    from moeport.bench.comm import bench_comm

    if not bench_comm(CommOptions(operations or [], sizes, runs, dtype, variants, tokens, chunks, target, files)):
        raise typer.Exit(1)
