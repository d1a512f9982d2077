"""Verdicts of parity for the quickstart and every router, as the Markdown table of docs/results.md.

The reference is numpy in float64, which has no gradients; those are held against PyTorch's in float64. A router that is
registered enters by existing: by its file in configs/routers, or else with its defaults in the quickstart.

    python benchmarks/parity_table.py [CONFIG ...] [--sequences 2] [--tokens 32]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from moeport.config import load_config
from moeport.parity.result import Comparison, Report, worst
from moeport.parity.run import run
from moeport.parity.subject import Size
from moeport.routers import ROUTERS

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "numpy:fp64": "numpy fp64",
    "torch-cpu:fp64": "torch fp64",
    "torch-cpu": "torch fp32",
    "torch-cpu:bf16": "torch bf16",
    "mindspore-cpu:fp64": "MindSpore fp64",
    "mindspore-cpu": "MindSpore fp32",
}
BYTES = "data.tokenizer.name=byte"
"""Parity does not depend on the tokenizer, and this one needs no training."""

NO_GRADIENTS = "gradients not compared (numpy has no gradients)"
"""The reason that the first comparison is a warning; later ones compare gradients."""


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, help="default: the quickstart and all routers")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    size = Size(arguments.sequences, arguments.tokens, steps=0)
    named: list[tuple[str, Path, list[str]]] = [(path.stem, path, []) for path in arguments.configs]

    print(f"| | {' | '.join([*VARIANTS.values()][1:])} | Verdict |")
    print(f"|{'---|' * (len(VARIANTS) + 1)}", flush=True)
    for name, file, overrides in named or every_config():
        report = run(file, [*VARIANTS], [*overrides, BYTES], size=size)
        print(f"| {name} | {' | '.join(map(cell, report.comparisons))} | {verdict(report)} |", flush=True)


def every_config() -> Iterator[tuple[str, Path, list[str]]]:
    """The quickstart, all files of routers, and the registered routers that have no file: name, file, overrides."""
    quickstart = CONFIGS / "quickstart.yaml"
    yield "quickstart", quickstart, []
    missing = set(ROUTERS)
    for file in sorted((CONFIGS / "routers").glob("*.yaml")):
        missing.discard(load_config(file).model.moe.router.name)
        yield file.stem, file, []
    for name in sorted(missing):
        yield name, quickstart, [f"model.moe.router={{name: {name}}}", "model.moe.allow_future_tokens=true"]


def cell(found: Comparison) -> str:
    """Largest errors of activations and of gradients, and the routing agreement where it is not whole."""
    errors = [
        max((t.error for t in found.tensors if t.kind == kind), default=None) for kind in ("activation", "gradient")
    ]
    shown = " / ".join("\N{EN DASH}" if error is None else f"{error:.1e}" for error in errors)
    choices = sum(routing.choices for routing in found.routing)
    agreement = sum(routing.agreement * routing.choices for routing in found.routing) / choices if choices else 1.0
    return shown if agreement == 1 else f"{shown}; {agreement:.1%}"


def verdict(report: Report) -> str:
    """The worst verdict, with the first lines of comparisons that fail to pass even apart from numpy's gradients."""
    odd = [found for found in report.comparisons if found.verdict != "pass" and found.reasons != [NO_GRADIENTS]]
    words = [worst([found.verdict for found in odd]), *(found.headline for found in odd)]
    return "; ".join(words).replace("|", "\\|")


if __name__ == "__main__":
    main()
