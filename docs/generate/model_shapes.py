"""What `moeport config check` and `moeport plan` print for the configs in examples/models."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeport.cli.main import whole_command
from moeport.config import load_config

FOLDER = Path(__file__).parents[2] / "examples/models"
CLUSTER = "--ranks-per-node 8 --intra 160GB/s,2us --inter 400GB/s,5us \\\n    --flops 400T --memory 80GB,2000GB"
"""Eight accelerators of 80 GB per node, and a network adapter of 50 GB/s for each."""
WIDTH = 118


@dataclass(frozen=True)
class Shape:
    """A published model."""

    title: str
    total: str
    """Its parameters, as its authors print them."""
    active: str
    nodes: int
    """Nodes of the cluster that is planned."""


SHAPES = {
    "olmoe-1b-7b": Shape("OLMoE-1B-7B", "6.9B", "1.3B", 4),
    "qwen3-30b-a3b": Shape("Qwen3-30B-A3B", "30.5B", "3.3B", 8),
    "mixtral-8x7b": Shape("Mixtral 8x7B", "46.7B", "12.9B", 16),
    "deepseek-v3": Shape("DeepSeek-V3", "671B", "37B", 256),
}
"""By the name of the file."""


def parameters() -> str:
    """A table of the published and the counted numbers of parameters."""
    rows = ["| Config | Published: total, active | Counted: total | Counted: active |", "|---|---|---|---|"]
    for name, shape in SHAPES.items():
        counts = load_config(FOLDER / f"{name}.yaml").model.parameter_counts(0)
        published = f"{shape.total}, {shape.active}"
        rows.append(f"| [`{name}.yaml`]({name}.yaml) | {published} | {counts.total:,} | {counts.active:,} |")
    return "\n".join(rows)


def outputs(name: str) -> str:
    """The two commands for a config, and what they print."""
    path = f"examples/models/{name}.yaml"
    plan = f"plan {path} \\\n    --nodes {SHAPES[name].nodes} {CLUSTER}"
    blocks = []
    for command in (f"config check {path}", plan):
        shown = printed(command.replace("\\\n", ""))
        blocks += [f"```console\n$ moeport {command}\n```", f"```text\n{shown}\n```"]
    return "\n" + "\n\n".join(blocks) + "\n"


def printed(command: str) -> str:
    """What a command prints, with long sentences on several lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        whole_command()(command.split(), prog_name="moeport", standalone_mode=False)
    return "\n".join(_lines(out.getvalue().strip("\n"))).strip("\n")


def _lines(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.splitlines():
        is_sentence = line[:1].isalpha()
        lines += textwrap.wrap(line, WIDTH, break_on_hyphens=False) if is_sentence else [line.rstrip()]
    return lines


def pieces() -> dict[str, Callable[[], str]]:
    """The generated regions of examples/models/README.md."""
    return {"parameters": parameters, **{name: partial(outputs, name) for name in SHAPES}}
