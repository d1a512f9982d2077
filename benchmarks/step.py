"""A whole training step: moeport against a plain torch model and transformers, and what each of its kernels gains.

    python benchmarks/step.py [--models 844m,quickstart] [--ablate] [--minutes 5] [--out FOLDER]
    python benchmarks/step.py --models quickstart --device cpu --dtype float32
    python benchmarks/step.py --models 844m --variant "compiled:backend.compile=true"
    python benchmarks/step.py --device cpu --tiny --ablate

A step is forward, backward, clipping by the global norm and AdamW; the models have the same sizes, moeport's and the
plain one the same weights, and their first losses are compared. They take turns, each of several steps without a wait
between them. `--ablate` leaves every kernel that is fused on the device to its composition in turn; `--variant` adds a
way to train with other settings. MFU is the FLOPs of the step (docs/training.md) over those of a large matrix product
measured before it. On an accelerator each model has a process of its own.

Writes step.json and step.md to the folder after every model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest.contest import machine
from contest.jobs import Process, write_whole
from contest.models import config_of
from contest.output import MIB, machine_line
from contest.steps import PLAIN, TRANSFORMERS, StepTerms, Variant, ablations, time_model
from moe_layer import accelerator, positive

from moeport.errors import UserError

MARGIN_S = 20.0
"""A process is ended this long after its share of the budget, if the budget has not ended before."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=None, help="by comma: 844m, quickstart, cpu, tiny, or YAML files")
    parser.add_argument("--device", default=None, help="cpu, cuda, npu; default: the accelerator that torch finds")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=positive, default=8)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--ablate", action="store_true", help="also without each fused kernel")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:KEY=VALUE[;KEY=VALUE]")
    parser.add_argument("--others", default=f"{PLAIN},{TRANSFORMERS}", help="other models, by comma; empty: none")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few rounds: checks the benchmark itself")
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction, default=None, help="processes of their own")
    parser.add_argument("--out", type=Path, default=None, help="folder for step.json and step.md")
    parser.add_argument("--job", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def variants(options: argparse.Namespace, device: str) -> list[Variant]:
    """Ways to train that were asked for."""
    found = []
    for text in options.variant:
        name, colon, settings = text.partition(":")
        if not colon or "=" not in settings:
            raise SystemExit(f"--variant {text}: expected NAME:KEY=VALUE, such as compiled:backend.compile=true")
        found.append(Variant(name, settings.split(";")))
    return found + (ablations(device) if options.ablate else [])


def table(found: Mapping[str, Any]) -> str:
    """All models as Markdown tables."""
    parts = [machine_line(found["machine"])]
    for cell in found["cells"]:
        parts.append(_cell_table(cell))
    parts.append(
        "over moeport: median of the ratios of the times of a step in the same rounds; MFU: of a large matrix product "
        "measured in the same process; held: between forward and backward, weights and their casts included."
    )
    return "\n\n".join(parts) + "\n"


def _cell_table(cell: Mapping[str, Any]) -> str:
    model = cell.get("model")
    if model is None:
        return f"**{cell['name']}**: {cell['reason']}"
    lines = [
        f"**{model['name']}**: {model['parameters']:,} parameters ({model['active']:,} active), {model['tokens']:,} "
        f"tokens per step, {cell['dtype']}; a large product {cell['peak_flops'] / 1e12:.3g} TFLOP/s",
        "",
        "| | step, ms | tokens/s | MFU | over moeport | held, MiB | peak, MiB | waits |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in cell["rows"].items():
        if "step_s" not in row:
            lines.append(f"| {name} | {row.get('reason', 'not timed')} | | | | | | |")
            continue
        peak = "-" if row["peak"] is None else f"{row['peak'] / MIB:,.0f}"
        lines.append(
            f"| {name}{' (' + row['reason'] + ')' if 'reason' in row else ''} "
            f"| {1e3 * statistics.median(row['step_s']):.4g} | {row['tokens_per_s']:,.0f} | {row['mfu']:.1%} "
            f"| {statistics.median(row['over_moeport']):.3f} | {row['held'] / MIB:,.1f} | {peak} "
            f"| {'-' if row['waits'] is None else row['waits']} |"
        )
    return "\n".join(lines)


def serve(job: Mapping[str, Any]) -> None:
    """Do the job of a process: one model."""
    ways = [Variant(**each) for each in job["variants"]]
    path = Path(job["result"])
    result = time_model(
        job["name"], ways, job["others"], StepTerms(**job["terms"]), lambda found: write_whole(path, found)
    )
    write_whole(path, result)


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Time the models; print and write the results."""
    options = arguments(given)
    if options.job:
        serve(json.loads(options.job.read_text(encoding="utf-8")))
        sys.stdout.flush()
        os._exit(0)  # tearing down a device takes time that belongs to the next process
    device = options.device or accelerator()
    default = "tiny" if options.tiny else "cpu,quickstart" if device == "cpu" else "844m,quickstart"
    names = (options.models or default).split(",")
    end = time.time() + 60 * options.minutes
    ways, others = variants(options, device), [each for each in options.others.split(",") if each]
    strange = [each for each in others if each not in (PLAIN, TRANSFORMERS)]
    if strange:
        raise SystemExit(f"--others: {', '.join(strange)}: unknown; expected some of {PLAIN}, {TRANSFORMERS}")
    try:
        for name in names:
            for way in (Variant(""), *ways):
                config_of(name, device, options.dtype, way.overrides)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    isolate = device != "cpu" if options.isolate is None else options.isolate
    found: dict[str, Any] = {"machine": machine(device), "cells": []}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            deadline = time.time() + (end - time.time()) / (len(names) - index)
            terms = StepTerms(device, options.dtype, 2 if options.tiny else options.rounds, deadline)
            if isolate:
                job = {
                    "name": name,
                    "variants": [asdict(way) for way in ways],
                    "others": others,
                    "terms": asdict(terms),
                }
                process = Process(Path(__file__), job, Path(folder), f"step {index}")
                why = process.wait(min(end, deadline + MARGIN_S))
                cell = process.result() | ({"reason": why} if why else {})
            else:
                cell = time_model(name, ways, others, terms, lambda result: None)
            found["cells"].append(cell | {"name": name})
            found["machine"]["name"] = cell.get("device") or found["machine"].get("name", "")
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "step.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
                (options.out / "step.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
