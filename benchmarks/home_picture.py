"""The picture of README.md and of the documentation's home: what moeport is for, in three charts.

    python benchmarks/home_picture.py [--output-dir runs/home] [--images docs/images]

Each is made by a command of moeport: the quickstart trained by PyTorch and by MindSpore; `moeport parity run` of these
two, and of two programs that differ in the epsilon of a norm; and `moeport plan` of a model with the shape of
Qwen3-30B-A3B. Needs MindSpore and matplotlib. Writes home-light.svg and home-dark.svg. Finished parts are read again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUICKSTART, BIG = str(ROOT / "configs" / "quickstart.yaml"), str(ROOT / "examples" / "models" / "qwen3-30b-a3b.yaml")
CLUSTER = "--nodes 16 --ranks-per-node 8 --intra 400GB/s,2us --inter 400GB/s,5us --flops 400T --memory 80GB,1TB"
BACKENDS = {"torch": "PyTorch", "mindspore": "MindSpore"}
OTHER = "torch-cpu model.norm_eps=1e-6"
FORWARD = ("activation", "score")
"""Kinds of tensors that are drawn in the order of execution."""
THEMES = {
    "light": {"text": "#1f2328", "grid": "#d0d7de", "lines": ("#0550ae", "#d1570b", "#57606a")},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "lines": ("#79c0ff", "#ffa657", "#9198a1")},
}
"""Colours on a background that is left transparent."""


def moeport(*arguments: str, codes: Sequence[int] = (0,)) -> None:
    """Run a command. Raises CalledProcessError unless it ends with one of these codes."""
    done = subprocess.run([sys.executable, "-m", "moeport", *arguments], stdout=subprocess.DEVNULL)
    if done.returncode not in codes:
        raise subprocess.CalledProcessError(done.returncode, done.args)


def losses(folder: Path, steps: int) -> dict[str, list[float]]:
    """The loss of each step, by backend."""
    found = {}
    for backend in BACKENDS:
        run = folder / backend
        settings = {
            "run.dir": run,
            "backend.name": backend,
            "backend.dtype": "float32",
            "training.steps": steps,
            "metrics.sample_tokens": 0,
        }
        moeport("train", QUICKSTART, "--resume", *(f"--set={key}={value}" for key, value in settings.items()))
        records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        found[backend] = [record["loss"] for record in records if "loss" in record]
    return found


def parity(folder: Path, name: str, *variants: str) -> dict[str, Any]:
    """The comparison of two variants of the quickstart."""
    file = folder / f"parity-{name}.json"
    if not file.exists():
        given = (f"--variant={each}" for each in variants)
        moeport("parity", "run", QUICKSTART, *given, "--json", str(file), codes=(0, 1))  # 1: they differ
    comparison: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["comparisons"][0]
    return comparison


def planned(folder: Path) -> list[dict[str, Any]]:
    """The placements of the big model, by the number of ranks that share the experts."""
    file = folder / "plan.json"
    moeport("plan", BIG, *CLUSTER.split(), "--json", str(file))
    return sorted(json.loads(file.read_text(encoding="utf-8"))["placements"], key=lambda each: int(each["expert"]))


def draw_losses(axes: Any, found: Mapping[str, Sequence[float]], lines: Sequence[str]) -> None:
    """Both curves."""
    for (backend, label), color, width, style in zip(BACKENDS.items(), lines, (3.5, 1.4), ("-", "--"), strict=False):
        values = found[backend]
        axes.plot(range(1, len(values) + 1), values, style, color=color, linewidth=width, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend(frameon=False, labelcolor=axes.xaxis.label.get_color())


def draw_errors(axes: Any, same: Mapping[str, Any], other: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Errors of tensors of the forward pass in the order of execution, with the limit."""
    for found, label, color in ((same, "MindSpore", lines[0]), (other, "another epsilon", lines[1])):
        shown = [each for each in found["tensors"] if each["kind"] in FORWARD and each["error"]]
        first = min(each["order"] for each in found["tensors"] if each["kind"] in FORWARD)
        axes.semilogy([each["order"] - first for each in shown], [each["error"] for each in shown], ".", color=color)
        axes.plot([], [], "o", color=color, label=f"PyTorch against {label}")
    limit = next(each["limit"] for each in same["tensors"] if each["kind"] == FORWARD[0])
    axes.axhline(limit, color=lines[2], linestyle="--", linewidth=1, label=f"limit, {limit:.0e}")
    axes.set_xlabel("operation of the forward pass")
    axes.set_ylabel("relative error")
    axes.set_ylim(1e-8, 1e-1)
    axes.legend(frameon=False, labelcolor=axes.xaxis.label.get_color(), loc="upper left")


def draw_plan(axes: Any, placements: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
    """The time of a step, divided into what takes it, with the memory per rank above."""
    parts = {"compute": "compute", "exchange": "all-to-all", "gradients": "gradients"}
    bottom = [0.0] * len(placements)
    for (part, label), color in zip(parts.items(), (lines[2], lines[1], lines[0]), strict=True):
        height = [each[part] for each in placements]
        axes.bar(range(len(placements)), height, 0.7, bottom, color=color, label=label)
        bottom = [low + own for low, own in zip(bottom, height, strict=True)]
    for at, (each, top) in enumerate(zip(placements, bottom, strict=True)):
        memory = sum(value for kind, value in each["memory"].items() if kind not in ("saved", "program")) / 2**30
        axes.annotate(f"{memory:,.0f}", (at, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(placements)), [str(each["expert"]) for each in placements])
    axes.set_xlabel("ranks that share the experts\n(above the bars: GiB per rank)")
    axes.set_ylabel("predicted step, seconds")
    axes.set_ylim(0, 1.4 * max(bottom))
    axes.legend(frameon=False, labelcolor=axes.xaxis.label.get_color(), loc="upper left", ncols=3, columnspacing=1)


def draw(found: tuple[Any, Any, Any, Any], theme: Mapping[str, Any], file: Path) -> None:
    """Draw the three panels in the colours of a theme."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    text, grid = theme["text"], theme["grid"]
    colors = {f"{part}color": text for part in ("text.", "axes.label", "xtick.", "ytick.")}
    style = {
        **colors,
        "axes.edgecolor": grid,
        "grid.color": grid,
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "moeport",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 3.6), layout=ConstrainedLayoutEngine(w_pad=0.12))
        first, second, third = figure.subplots(1, 3)
        draw_losses(first, found[0], theme["lines"])
        draw_errors(second, found[1], found[2], theme["lines"])
        draw_plan(third, found[3], theme["lines"])
        titles = ("One config, two frameworks", "Where two runs part", "A cluster, before you have it")
        for axes, title in zip((first, second, third), titles, strict=True):
            axes.set_title(title, fontsize=11, fontweight="bold")
            axes.grid(alpha=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None}, transparent=True)


def main() -> None:
    """Run the commands and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/home"), help="for the runs; repeat to continue")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="where the pictures are written")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    trained = losses(given.output_dir, given.steps)
    same = parity(given.output_dir, "mindspore", "torch-cpu", "mindspore-cpu")
    other = parity(given.output_dir, "epsilon", "torch-cpu", OTHER)
    found = (trained, same, other, planned(given.output_dir))
    for name, theme in THEMES.items():
        draw(found, theme, given.images / f"home-{name}.svg")
    differences = [abs(a - b) for a, b in zip(*trained.values(), strict=True)]
    apart = next((step for step, each in enumerate(differences, 1) if each > 0.001), len(differences))
    print(
        f"losses of {len(differences)} steps: above 0.001 nats apart from step {apart}, at most {max(differences):.4f}"
    )
    print(*(each["headline"] for each in (same, other)), sep="\n")


if __name__ == "__main__":
    main()
