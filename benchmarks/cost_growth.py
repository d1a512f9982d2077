"""Cost of an MoE layer as work grows: bytes per token and time against ranks, experts and experts per token.

    python benchmarks/cost_growth.py [--rounds 2] [--output docs/images] [--keep FOLDER] [--quick]

Needs root: it runs `moeport emulate -- bench moe` on nodes of 2 ranks with links of limited rate, forward and backward,
tokens to experts drawn uniformly. One of ranks, experts and top-k grows, the others stay. From 64 ranks on there is one
expert a rank. All shapes run in turn, `--rounds` times; the median over the rounds counts.

What was not run is predicted. Bytes follow from the expected rows of `moeport.plan.routes`. The time of a layer is the
sum of two predictions:

- compute: the time of `local`, the layer without an all-to-all, as a + b rows + c scores + d experts of one rank, with
  the rows that its experts compute, the scores of its router (tokens x experts) and the experts that are there. It is
  fitted to the `local` of all shapes that ran, divided by the number of nodes that shared the machine.
- exchange: `Links.cost` with links fitted to what the layer took longer than its `local`, all shapes and algorithms.

On the emulated cluster all ranks share the cores of one machine, and both predictions count that. Beyond 8 ranks each
node is a machine of its own with as many cores: its two ranks compute as on the one node that ran, and the links are
the same. The compute of all ranks and the bytes inside their nodes then pass at once, so that those lines do not go
through the points of the emulated cluster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from moeport.comm.exchange import EXCHANGES, loads
from moeport.comm.load import Demand, Layout, Sharing, ranks_sharing
from moeport.plan.cost import Links
from moeport.plan.fit import Sample, fit, non_negative_least_squares
from moeport.plan.routes import expected_routes

PER_NODE, WIDTH, HIDDEN, TOKENS, RATE = 2, 256, 128, 256, "200mbit"
"""Ranks of a node, numbers per token, width of an expert, tokens of a rank, link of a node."""
ROW_BYTES = 4 * WIDTH
BETWEEN, INSIDE, TIME = "between nodes, kB per token", "inside nodes, kB per token", "time of a layer, ms"
QUANTITIES = (BETWEEN, INSIDE, TIME)


@dataclass(frozen=True)
class Shape:
    """A layer on a cluster."""

    nodes: int = 2
    experts: int = 64
    top_k: int = 8

    @property
    def layout(self) -> Layout:
        """Ranks and nodes."""
        return Layout(self.nodes, PER_NODE)

    @property
    def demand(self) -> Demand:
        """Tokens and experts."""
        return Demand(TOKENS, self.top_k, self.experts, ROW_BYTES, backward=True)

    def measure(self, file: Path) -> None:
        """Write the rows of one run to a file."""
        command = [sys.executable, "-m", "moeport", "emulate", "--nodes", str(self.nodes)]
        command += ["--ranks-per-node", str(PER_NODE), "--inter", RATE, "--", "bench", "moe"]
        command += ["-b", str(TOKENS * ROW_BYTES), "-e", str(TOKENS * ROW_BYTES), "-n", "5", "-w", "1"]
        command += ["--experts", str(self.experts), "--top-k", str(self.top_k), "--width", str(WIDTH)]
        command += ["--hidden", str(HIDDEN), "--traffic", "uniform", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{self}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


@dataclass(frozen=True)
class Sweep:
    """One number that grows."""

    name: str
    measured: dict[int, Shape]
    predicted: dict[int, Shape]
    """Those that ran too."""
    apart: bool = False
    """Whether what did not run has a machine for each node."""


def _of_ranks(*numbers: int) -> dict[int, Shape]:
    return {ranks: Shape(nodes=ranks // PER_NODE, experts=max(64, ranks)) for ranks in numbers}


def _of_experts(*numbers: int) -> dict[int, Shape]:
    return {experts: Shape(experts=experts) for experts in numbers}


def _of_top_k(*numbers: int) -> dict[int, Shape]:
    return {top_k: Shape(top_k=top_k) for top_k in numbers}


SWEEPS = (
    Sweep("ranks", _of_ranks(2, 4, 8), _of_ranks(*(2**n for n in range(1, 11))), apart=True),
    Sweep("experts", _of_experts(8, 16, 32, 64), _of_experts(*(2**n for n in range(3, 11)))),
    Sweep("top-k", _of_top_k(1, 2, 4, 8), _of_top_k(*(2**n for n in range(6)))),
)
QUICK = (
    Sweep("ranks", _of_ranks(2, 4), _of_ranks(2, 4, 8, 16), apart=True),
    Sweep("experts", _of_experts(64), _of_experts(64, 128)),
    Sweep("top-k", _of_top_k(2, 8), _of_top_k(2, 4, 8)),
)


@dataclass(frozen=True)
class Model:
    """What was fitted."""

    compute: np.ndarray
    """Seconds: at least, a row, a score, an expert; see `_work`."""
    links: Links

    def seconds(self, shape: Shape, algorithm: str, shares: Sharing) -> float:
        """Of a layer."""
        together = ranks_sharing(shares, shape.layout)
        routes = expected_routes(shape.layout, shape.demand)
        exchange = self.links.cost(loads(algorithm, shape.layout, shape.demand, routes, together)).total
        return float(_work(shape) @ self.compute) * together / PER_NODE + exchange


def _work(shape: Shape) -> np.ndarray:
    """What multiplies the unknowns of the compute of one rank."""
    return np.array([1.0, TOKENS * shape.top_k, TOKENS * shape.experts, shape.experts / shape.layout.ranks])


def expected_kilobytes(shape: Shape, algorithm: str) -> tuple[float, float]:
    """kB per token to other nodes and inside the node, forward and backward: rows there and back and their gradients,
    and the numbers that say whose they are. All ranks send alike, so the load of the busiest is that of each.
    """
    found = loads(algorithm, shape.layout, shape.demand, expected_routes(shape.layout, shape.demand))
    between, inside = (sum(getattr(load, name) for load in found) for name in ("inter_bytes", "intra_bytes"))
    return between / PER_NODE / TOKENS / 1e3, inside / TOKENS / 1e3


Figures = dict[str, dict[str, float]]
"""By algorithm and quantity."""


def _measured(shapes: Sequence[Shape], folder: Path, rounds: int) -> dict[Shape, Figures]:
    """Medians over the rounds."""
    for turn in range(rounds):
        for shape in shapes:
            file = _file(folder, shape, turn)
            if not file.exists():
                print(f"round {turn + 1} of {rounds}: {shape}", file=sys.stderr, flush=True)
                shape.measure(file)
    found: dict[Shape, Figures] = {}
    for shape in shapes:
        turns = [json.loads(_file(folder, shape, turn).read_text())["rows"] for turn in range(rounds)]
        found[shape] = {
            same[0]["algorithm"]: {
                BETWEEN: same[0]["inter_node_bytes_per_token"] / 1e3,
                INSIDE: same[0]["intra_node_bytes_per_token"] / 1e3,
                TIME: float(np.median([row["time_us"] for row in same])) / 1e3,
            }
            for same in zip(*turns, strict=True)
        }
    return found


def _file(folder: Path, shape: Shape, turn: int) -> Path:
    return folder / f"{shape.nodes}-{shape.experts}-{shape.top_k}-{turn}.json"


def _fitted(measured: dict[Shape, Figures]) -> Model:
    """Compute and links; says how far they are from what was measured."""
    shapes = list(measured)
    alone_S = np.array([measured[shape]["local"][TIME] / 1e3 / shape.nodes for shape in shapes])
    work_S4 = np.array([_work(shape) for shape in shapes])
    compute = non_negative_least_squares(work_S4 / alone_S[:, None], np.ones(len(shapes)))
    samples = []
    for shape, figures in measured.items():
        routes, sharing = expected_routes(shape.layout, shape.demand), ranks_sharing("cluster", shape.layout)
        for name in EXCHANGES:
            seconds = (figures[name][TIME] - figures["local"][TIME]) / 1e3
            if seconds <= 0:
                sys.exit(f"{shape}: {name} took no longer than local; run again on a quiet machine")
            stages = loads(name, shape.layout, shape.demand, routes, sharing)
            samples.append(Sample(name, shape.layout, shape.demand, "uniform", "cluster", stages, seconds))
    links = fit(samples)
    for what, error_S in (("compute", work_S4 @ compute / alone_S - 1), ("exchange", links.errors)):
        error_S = np.abs(error_S)
        print(f"{what}: {len(error_S)} fitted, median error {np.median(error_S):.0%}, largest {error_S.max():.0%}")
    model = Model(compute, links.links)
    whole = [
        abs(model.seconds(shape, name, "cluster") * 1e3 / figures[name][TIME] - 1)
        for shape, figures in measured.items()
        for name in EXCHANGES
    ]
    print(f"layer: median error {np.median(whole):.0%}, largest {max(whole):.0%}\n")
    return model


def _predicted(sweep: Sweep, model: Model, shares: Sharing) -> dict[int, Figures]:
    found: dict[int, Figures] = {}
    for number, shape in sweep.predicted.items():
        found[number] = {}
        for name in EXCHANGES:
            between, inside = expected_kilobytes(shape, name)
            seconds = model.seconds(shape, name, shares)
            found[number][name] = {BETWEEN: between, INSIDE: inside, TIME: 1e3 * seconds}
    return found


def _draw(sweeps: Sequence[Sweep], measured: dict[Shape, Figures], model: Model, path: Path) -> None:
    """Rows of panels: quantities; columns: what grows."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    colors = dict(zip(EXCHANGES, cycle(("#1b6ca8", "#d1781f", "#2f8f4e"))))
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(len(QUANTITIES), len(sweeps), sharex="col", sharey="row")
    for column, sweep in enumerate(sweeps):
        here = {n: figures for n, figures in _predicted(sweep, model, "cluster").items() if _on_machine(sweep, n)}
        lines = [(here, "--")] + ([(_predicted(sweep, model, "node"), ":")] if sweep.apart else [])
        for row, quantity in enumerate(QUANTITIES):
            axes = panels[row][column]
            for name, color in colors.items():
                look: dict[str, Any] = {"color": color, "linewidth": 3 if name == "flat" else 1.5}
                for figures, style in lines if quantity == TIME else lines[-1:]:  # bytes are the same on any machine
                    axes.plot(list(figures), [each[name][quantity] for each in figures.values()], style, **look)
                points = [measured[shape][name][quantity] for shape in sweep.measured.values()]
                axes.plot(list(sweep.measured), points, "-o", markersize=4, **look)
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(sweep.predicted)[::3], [str(number) for number in list(sweep.predicted)[::3]])
            axes.grid(axis="y", alpha=0.3)
            if quantity == TIME:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:,.0f}")
                axes.set_xlabel(sweep.name)
            else:
                axes.locator_params(axis="y", nbins=5)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(bottom=False, left=False)
            if column == 0:
                axes.set_ylabel(quantity)
    keys = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    keys += [
        Line2D([], [], color="gray", linestyle=style, marker=marker, markersize=4, label=label)
        for style, marker, label in (
            ("-", "o", "measured"),
            ("--", "", "predicted, all ranks on one machine"),
            (":", "", "predicted, a machine for each node"),
        )
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=3)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moeport"}):
        figure.savefig(path, metadata={"Date": None})


def _on_machine(sweep: Sweep, number: int) -> bool:
    return not sweep.apart or number <= max(sweep.measured)


def _print(sweep: Sweep, measured: dict[Shape, Figures], model: Model) -> None:
    """A Markdown table of one sweep."""
    together, apart = (_predicted(sweep, model, shares) for shares in ("cluster", "node"))
    headings = [sweep.name, "algorithm", BETWEEN, INSIDE, "layer, ms: measured"]
    headings += ["predicted, one machine"] + ["predicted, a machine for each node"] * sweep.apart
    print(f"| {' | '.join(headings)} |\n|{'--:|' * len(headings)}")
    for number, shape in sweep.predicted.items():
        for name in EXCHANGES:
            real = measured[shape][name] if number in sweep.measured else None
            cells = [str(number), name]
            for quantity in (BETWEEN, INSIDE):
                value = together[number][name][quantity]
                cells.append(f"{real[quantity]:.2f} (expected {value:.2f})" if real else f"expected {value:.2f}")
            cells.append(f"{real[TIME]:,.1f}" if real else "")
            cells.append(f"{together[number][name][TIME]:,.1f}" if _on_machine(sweep, number) else "")
            if sweep.apart:
                cells.append(f"{apart[number][name][TIME]:,.1f}")
            print(f"| {' | '.join(cells)} |")
    print()


def main() -> None:
    """Measure, fit, predict, print Markdown tables and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of cost-growth.svg")
    parser.add_argument("--keep", type=Path, help="folder for the files of bench moe; those that are there count")
    parser.add_argument("--quick", action="store_true", help="few shapes, to see that it works")
    args = parser.parse_args()
    sweeps = QUICK if args.quick else SWEEPS
    shapes = list(dict.fromkeys(shape for sweep in sweeps for shape in sweep.measured.values()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        measured = _measured(shapes, folder, args.rounds)
    print(f"{TOKENS} tokens of {WIDTH} per rank, {PER_NODE} ranks per node, links of {RATE}; the rest: {Shape()}\n")
    model = _fitted(measured)
    for sweep in sweeps:
        _print(sweep, measured, model)
    args.output.mkdir(parents=True, exist_ok=True)
    _draw(sweeps, measured, model, args.output / "cost-growth.svg")


if __name__ == "__main__":
    main()
