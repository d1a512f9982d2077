"""Peak host memory of a rank at the start, in steps, while saving and when resuming, for 1, 2, 4 and 8 ranks.

    python benchmarks/memory.py [--backends torch mindspore] [--ranks 1 2 4 8] [--experts 16] [--tree WORKTREE]

The ranks share the experts, and with torch also divide everything else. A peak is `VmHWM`, which is reset before each
phase, so it belongs to that phase alone. The interpreter, the libraries and their buffers are measured apart: by the
same run of a model with as many arrays and next to nothing in them. Its peak in the same phase, on as many ranks, is
subtracted. What is left should be the memory of one rank divided by the number of ranks. Prints a table, and writes
memory.json and memory.svg to the folder of `--output`. `--plot FILE...` draws files that were written earlier.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sized_runs import Size, config_of, run, write_found

PHASES = {
    "start": "from the command to the first step",
    "steps": "the first step",
    "save": "two checkpoints, one of them beside a step",
    "resume": "from the command to the first step, from a checkpoint",
}
MIB = 2**20


def main() -> None:
    """Measure, print and draw; or, in a rank, train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rank", nargs="*", metavar="CONFIG STEM", help="given to the ranks that this starts")
    parser.add_argument("--resume", action="store_true", help="given to the ranks that this starts")
    parser.add_argument("--backends", nargs="+", default=["torch", "mindspore"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the repository to measure")
    parser.add_argument("--label", default="now", help="names the tree in the table and the plot")
    parser.add_argument("--output", type=Path, default=Path("runs/memory"))
    parser.add_argument("--plot", nargs="+", type=Path, help="draw these files only")
    Size.add_options(parser)
    given = parser.parse_args()
    if given.rank:
        _rank(given.rank[0], given.rank[1], given.resume)
        return
    if given.plot:
        rows = [row for file in given.plot for row in json.loads(file.read_text())]
    else:
        rows = _measured(given, Size.of(given))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    draw(rows, given.output / "memory.svg")


def _measured(given: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    rows = []
    for backend in given.backends:
        for ranks in given.ranks:
            base, found = (_peaks(backend, ranks, each, given.tree.resolve()) for each in (size.tiny, size))
            row = {"tree": given.label, "backend": backend, "ranks": ranks, "parameters": size.parameters}
            rows.append({**row, "base": base, "peak": found})
            print(table(rows[-1:]), flush=True)
    return rows


def _peaks(backend: str, ranks: int, size: Size, tree: Path) -> dict[str, int]:
    """For each phase, the peak of the rank that has most."""
    scratch = Path(tempfile.mkdtemp(prefix="memory-"))
    try:
        folder = scratch / "job"
        config = config_of(size, backend, ranks, folder, checkpoint={"interval": 1})
        found = run("memory.py", backend, ranks, config, [], tree)
        config["training"]["steps"] += 1
        resumed = run("memory.py", backend, ranks, config, ["--resume"], tree)
    finally:
        shutil.rmtree(scratch)
    return {
        phase: max(each["start" if phase == "resume" else phase] for each in (resumed if phase == "resume" else found))
        for phase in PHASES
    }


def _rank(file: str, stem: str, resume: bool) -> None:
    """Train, and note the peak of each phase."""
    from moeport.config import load_config
    from moeport.training import loop
    from moeport.training import run as training

    found: dict[str, int] = {}

    def after(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            found.setdefault(phase, peak())
            return result

        return noted

    def before(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            found.setdefault(phase, peak())
            return function(*arguments, **options)

        return noted

    names: Any = training
    names.prepare = after("start", training.prepare)
    saver: Any = loop.Saver
    saver.save = before("steps", loop.Saver.save)
    peak()
    training.train(load_config(file), resume=resume)
    found["save"] = peak()
    write_found(stem, found)


def peak() -> int:
    """Bytes of the largest resident set since the last call, which starts a new count (Linux)."""
    status = Path("/proc/self/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * kib


def own(row: dict[str, Any], phase: str) -> int:
    """What a phase needs for the model."""
    return int(row["peak"][phase] - row["base"][phase])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each phase the peak of a rank, without the base, in MiB."""
    lines = [
        "Peak of a rank in MiB = base (libraries and a tiny model) + model",
        "",
        f"| | backend | parameters | ranks | {' | '.join(PHASES)} |",
        f"|---|---|--:|--:|{'--:|' * len(PHASES)}",
    ]
    for row in rows:
        cells = [
            f"{row['peak'][phase] / MIB:,.0f} = {row['base'][phase] / MIB:,.0f} + {own(row, phase) / MIB:,.0f}"
            for phase in PHASES
        ]
        head = [row["tree"], row["backend"], f"{row['parameters'] / 1e6:,.0f} M", str(row["ranks"])]
        lines.append(f"| {' | '.join(head + cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """A plot per phase: what a rank needs for the model against 1 / ranks, with a line through the origin."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(PHASES), sharey=True)
    colors = dict(zip(sorted({row["backend"] for row in rows}), ("tab:orange", "tab:blue"), strict=False))
    styles = dict(zip(dict.fromkeys(row["tree"] for row in rows), ("-", "--", ":"), strict=False))
    for axes, (phase, meaning) in zip(all_axes, PHASES.items(), strict=True):
        for backend, color in colors.items():
            for label, style in styles.items():
                several = [row for row in rows if (row["backend"], row["tree"]) == (backend, label)]
                if not several:
                    continue
                x = [1 / row["ranks"] for row in several]
                y = [own(row, phase) / MIB for row in several]
                axes.plot(x, y, style, color=color, marker="o", markersize=4, label=f"{backend}, {label}")
                if several[0]["ranks"] == 1 and style == "-":
                    axes.plot([0, 1], [0, y[0]], color=color, alpha=0.3, linewidth=1)
        axes.set_title(f"{phase}\n{textwrap.fill(meaning, 34)}", fontsize=8)
        axes.set_xlabel("1 / ranks")
        axes.set_xlim(0, 1.05)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylim(bottom=0)  # shared, so not before all lines are drawn
    all_axes[0].set_ylabel("peak of a rank less the base, MiB")
    all_axes[0].legend(fontsize=7)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moeport"}):
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
