"""What `moeport bench moe` does: times one MoE layer whose experts are divided among the ranks of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeport.backends.base import Backend
from moeport.bench.job import current_job, describe_ranks, joined, machine
from moeport.bench.layer import ALGORITHMS, AUTO, LayerBench, LayerTraffic
from moeport.bench.layer_output import LayerRow, table, write_plot
from moeport.bench.measure import measure
from moeport.bench.options import LayerOptions, check_experts, check_names, chunk_counts, one_dtype
from moeport.bench.output import write_csv, write_json
from moeport.comm.communicator import Communicator
from moeport.config import Config, config_from_dict, load_config
from moeport.errors import UserError
from moeport.model.auto_exchange import FastestExchange
from moeport.pages.console import wide_console
from moeport.training.agreed import of_kernels

LAYER = {
    "model.d_model": 256,
    "model.moe.num_experts": 64,
    "model.moe.expert_hidden": 128,
    "model.moe.router.name": "topk",
    "model.moe.router.top_k": 8,
}
"""The layer if no config is given."""


def bench_moe(options: LayerOptions) -> bool:
    """Time the layer with every algorithm at every size, print a table and write the files. Every rank must call it.

    Returns: whether all values were correct.

    Raises UserError for invalid options, before anything starts.
    """
    launch = current_job("moe")
    sizes, chunks = options.sizes.values(), chunk_counts(options.chunks)
    algorithms = list(options.algorithms or ALGORITHMS)
    check_names("algorithm", algorithms, (*ALGORITHMS, AUTO))
    options.target.check()
    config = _config(options, launch.backend)
    check_experts(config.model.moe.num_experts, launch.size)
    traffic = LayerTraffic(options.traffic, options.backward)
    traffic.check(config.model.moe)
    with joined(launch, "bench moe", config, options) as (backend, communicator):
        communicator.agree(of_kernels(backend))
        bench = LayerBench(config, backend, communicator, algorithms, chunks, traffic)
        rows, choices = _measure(bench, sizes, options)
        if communicator.rank == 0:
            _show(options, config, communicator, backend, rows, choices)
    return not any(row.wrong for row in rows)


def _measure(
    bench: LayerBench, sizes: Sequence[int], options: LayerOptions
) -> tuple[list[LayerRow], dict[int, FastestExchange]]:
    """One row per algorithm and size, and the choices of `auto` by size in bytes."""
    rows: list[LayerRow] = []
    choices: dict[int, FastestExchange] = {}
    for size in sizes:
        ready = bench.prepare(size, check=bool(options.runs.check))
        if rows and ready[0].bytes == rows[-1].size:
            continue  # small sizes may mean the same number of tokens
        if bench.choice:
            choices[ready[0].bytes] = bench.choice[0]
        timings = measure(ready, bench.communicators, bench.backend.ops, options.runs)
        ranks = bench.mesh.world.size
        rows += [LayerRow.of(run, ranks, timing) for run, timing in zip(ready, timings, strict=True)]
    return rows, choices


def _show(
    options: LayerOptions,
    config: Config,
    communicator: Communicator,
    backend: Backend,
    rows: Sequence[LayerRow],
    choices: Mapping[int, FastestExchange],
) -> None:
    """Print the results, and write the requested files."""
    layer, width, files, console = config.model.moe, config.model.d_model, options.files, wide_console()
    console.print(
        f"{describe_ranks(communicator, backend)}; {layer.num_experts} experts of {layer.expert_hidden}, "
        f"{layer.router.name} top-{layer.router.experts_per_token}, tokens of {width}, "
        f"{backend.dtype}, traffic {options.traffic}, forward{' and backward' if options.backward else ''}"
    )
    console.print(table(rows))
    for size, choice in choices.items():
        console.print(f"auto, {size:,} bytes: {choice}", soft_wrap=True)
    if files.json_file:
        asked = {
            "d_model": width,
            "moe": layer.model_dump(mode="json"),
            "traffic": options.traffic,
            "backward": options.backward,
            "auto": {size: {"algorithm": each.algorithm, "chunks": each.chunks} for size, each in choices.items()},
        }
        write_json(files.json_file, machine(communicator, backend) | asked, rows)
    if files.csv_file:
        write_csv(files.csv_file, rows)
    if files.plot_file:
        write_plot(files.plot_file, rows)


def _config(options: LayerOptions, launcher_backend: str) -> Config:
    """The config with the flags applied, or the default layer with the flags applied."""
    shape, target = options.shape, options.target
    name = target.backend or launcher_backend
    flags: dict[str, object] = {
        "model.moe.num_experts": shape.experts,
        "model.moe.router.top_k": shape.top_k,
        "model.d_model": shape.width,
        "model.moe.expert_hidden": shape.hidden,
        "backend.dtype": options.dtype and one_dtype(options.dtype, name, target.device),
        "backend.name": name,
        "backend.device": target.device,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    overrides = shape.overrides or []
    if shape.config_file is not None:
        return load_config(shape.config_file, [*(f"{key}={value}" for key, value in given.items()), *overrides])
    if overrides:
        raise UserError(f"--set {overrides[0]}: no config to override; expected --config CONFIG")
    return config_from_dict(_nested({"model.attention.num_heads": 1, "model.attention.head_dim": 2, **LAYER, **given}))


def _nested(values: Mapping[str, object]) -> dict[str, Any]:
    """Convert values by dotted key to nested sections."""
    whole: dict[str, Any] = {}
    for key, value in values.items():
        section = whole
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return whole
