"""`moeport bench moe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from moeport.cli.options import Overrides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moeport.config import Config
    from moeport.model.auto_exchange import FastestExchange

LAYER = {
    "model.d_model": 256,
    "model.moe.num_experts": 64,
    "model.moe.expert_hidden": 128,
    "model.moe.router.name": "topk",
    "model.moe.router.top_k": 8,
}
"""The layer where no config is given."""


def moe(
    algorithms: Annotated[
        list[str] | None,
        typer.Argument(
            help="Which; default: all of local, flat, hierarchical, node_dedup. auto: what comm.algorithm: auto takes.",
            show_default=False,
        ),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG", help="The layer of this YAML config.")
    ] = None,
    overrides: Overrides = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts; default: the config's, else 64.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts a token; default: the config's, else 8.", show_default=False)
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Numbers of a token; default: the config's, else 256.", show_default=False)
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Width of an expert; default: the config's, else 128.", show_default=False)
    ] = None,
    chunks: Chunks = "1",
    minimum: Minimum = "64K",
    maximum: Maximum = "1M",
    factor: Factor = 4,
    repetitions: Repetitions = 10,
    warmup: Warmup = 2,
    check: Check = 1,
    dtype: Annotated[
        DType | None,
        typer.Option("--datatype", "-d", help="Compute type; default: the config's, else float32.", show_default=False),
    ] = None,
    traffic: Annotated[
        str, typer.Option(help="Experts of the tokens: those of the router, or as in bench comm: uniform, zipf, ...")
    ] = "router",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="No backward pass.")] = False,
    backend: BackendName = None,
    device: Device = "auto",
    timeout: Timeout = 120.0,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw time over size here, .png, .svg or .pdf; needs matplotlib.")
    ] = None,
) -> None:
    """Time one MoE layer whose experts are divided among all ranks, and check its values, under torchrun or msrun.

    Forward and backward pass of router, drops, all-to-all, experts and shared experts, with each all-to-all and each
    number of chunks. `local` is the same layer without an all-to-all: as many rows, all to the experts of their own
    rank. Times are medians of the slowest rank. The size is that of one rank's tokens.
    """
    from moeport.backends import get_backend
    from moeport.bench.layer import ALGORITHMS, AUTO, LayerBench, Traffic
    from moeport.bench.layer_output import LayerRow, table, write_plot
    from moeport.bench.measure import measure
    from moeport.bench.output import write_csv, write_json
    from moeport.cli.bench_job import (
        about,
        check_experts,
        check_names,
        numbers_of_chunks,
        ranks_in_words,
        sizes,
        started,
        wide_console,
    )

    launch = started("moe")
    wanted_sizes, wanted_chunks = sizes(minimum, maximum, factor), numbers_of_chunks(chunks)
    wanted = list(algorithms or ALGORITHMS)
    check_names("algorithm", wanted, (*ALGORITHMS, AUTO))
    flags: dict[str, object] = {
        "model.moe.num_experts": experts,
        "model.moe.router.top_k": top_k,
        "model.d_model": width,
        "model.moe.expert_hidden": hidden,
        "backend.dtype": dtype,
        "backend.name": backend or launch.backend,
        "backend.device": device,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    config = _config(config_file, given, overrides or [])
    layer = config.model.moe
    check_experts(layer.num_experts, launch.size)
    chosen = get_backend(config.backend)
    tokens = Traffic(traffic, backward=not forward_only)
    tokens.check(layer)
    with chosen.communicator(launch, timeout) as communicator:
        bench = LayerBench(config, chosen, communicator, wanted, wanted_chunks, tokens)
        rows: list[LayerRow] = []
        choices: dict[int, FastestExchange] = {}
        for size in wanted_sizes:
            ready = bench.prepare(size, check=bool(check))
            if bench.choice:
                choices[ready[0].bytes] = bench.choice[0]
            taken = measure(
                ready,
                bench.communicators,
                chosen.ops,
                warmup=warmup,
                repetitions=repetitions,
                check=bool(check),
            )
            rows += [LayerRow.of(run, communicator.size, times) for run, times in zip(ready, taken, strict=True)]
        if communicator.rank == 0:
            console = wide_console()
            console.print(
                f"{ranks_in_words(communicator, chosen)}; {layer.num_experts} experts of {layer.expert_hidden}, "
                f"{layer.router.name} top-{layer.router.experts_per_token}, tokens of {config.model.d_model}, "
                f"{chosen.dtype}, to the experts of {traffic}, forward{'' if forward_only else ' and backward'}"
            )
            console.print(table(rows))
            for size, choice in choices.items():
                console.print(f"auto, {size:,} bytes: {choice}", soft_wrap=True)
            shape = {
                "d_model": config.model.d_model,
                "moe": layer.model_dump(mode="json"),
                "traffic": traffic,
                "backward": not forward_only,
                "auto": {
                    size: {"algorithm": choice.algorithm, "chunks": choice.chunks} for size, choice in choices.items()
                },
            }
            if json_file:
                write_json(json_file, about(communicator, chosen) | shape, rows)
            if csv_file:
                write_csv(csv_file, rows)
            if plot_file:
                write_plot(plot_file, rows)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def _config(path: Path | None, given: Mapping[str, object], overrides: list[str]) -> Config:
    """The config with what the flags say, or one of a layer that only flags say."""
    from moeport.config import config_from_dict, load_config
    from moeport.errors import UserError

    if path is not None:
        return load_config(path, [*(f"{key}={value}" for key, value in given.items()), *overrides])
    if overrides:
        raise UserError(f"--set {overrides[0]}: there is no config to change; expected --config CONFIG")
    values: dict[str, Any] = {"model": {"attention": {"num_heads": 1, "head_dim": 2}}}
    for key, value in {**LAYER, **given}.items():
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return config_from_dict(values)
