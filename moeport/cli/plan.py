"""`moeport plan`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeport.cli.options import Overrides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moeport.comm.load import Sharing
    from moeport.plan.compute import SpeedFit
    from moeport.plan.cost import Links
    from moeport.plan.fit import Fit, Sample
    from moeport.plan.planner import Cluster, Placement

BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(B/s|bit/s)")
LATENCY = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s)")
FLOPS = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)")
STEP = re.compile(r"(.+)@([1-9]\d*)x([1-9]\d*)")
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
FIRST_STEPS = 3
"""Of a run, which take longer than others and do not count."""
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def plan(
    config_file: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="The YAML config; without it, the exchanges of the files of --from."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks of each node.")] = 8,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE.json", help="Of moeport bench comm --json on such a cluster. Repeatable."),
    ] = None,
    intra: Annotated[
        str | None, typer.Option(metavar="400GB/s,2us", help="Links inside a node: of a rank, and a message.")
    ] = None,
    inter: Annotated[
        str | None, typer.Option(metavar="25GB/s,5us", help="Link between nodes: of a whole node, and a message.")
    ] = None,
    traffic: Annotated[
        str, typer.Option(help="Experts of the tokens: uniform, zipf, local:F, or a .npy file of ids (tokens, K).")
    ] = "uniform",
    compute_ms: Annotated[
        float | None, typer.Option(min=0, help="Milliseconds that a rank computes in a step, as measured on one rank.")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(metavar="150T", help="Or floating-point operations that a rank does in a second.")
    ] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(
            "--step",
            metavar="RUN_DIR@2x4",
            help="Or a run of moeport train on that many nodes and ranks of each, whose steps show it. Repeatable.",
        ),
    ] = None,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
) -> None:
    """Predict all-to-all, step time and memory on a cluster, and say which placement and algorithm is best and why.

    Links are fitted to what `moeport bench comm --json` measured, or given, or both: what is given counts.
    Example: moeport plan configs/quickstart.yaml --nodes 4 --ranks-per-node 8 --intra 400GB/s,2us --inter 25GB/s,5us
    """
    import json

    from rich.console import Console

    from moeport.config import load_config
    from moeport.errors import UserError
    from moeport.plan import planner
    from moeport.plan.compute import Speed
    from moeport.plan.fit import fit, read_samples
    from moeport.plan.routes import routes

    samples = [sample for path in measured or () for sample in read_samples(path, routes)]
    fitted = fit(samples) if samples else None
    shares = {sample.shares for sample in samples} or {"nothing"}
    if len(shares) > 1:
        raise UserError("--from: some files are of an emulated cluster or of CPUs and some are not; expected one kind")
    if sum(bool(given) for given in (compute_ms is not None, flops, steps)) > 1:
        raise UserError("--compute-ms, --flops and --step all say how long a rank computes; expected one of them")
    links = _links(fitted, nodes, intra, inter)
    shared = shares.pop()
    cluster = planner.Cluster(nodes, ranks_per_node, links, shared)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    _show_links(console, cluster, fitted)
    figures: dict[str, Any] = {
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        "traffic": traffic,
        "links": _plain(links),
        "fit_errors": fitted.errors.tolist() if fitted else [],
    }
    if config_file is None:
        if not samples:
            raise UserError("CONFIG or --from FILE.json is needed: they say how many tokens go to how many experts")
        figures["exchanges"] = _exchanges(console, cluster, samples, traffic)
    else:
        config = load_config(config_file, overrides or ())
        planned = planner.Planner(config, _vocab_size(config), cluster, partial(routes, traffic))
        speed = None
        if steps:
            found_speed = _speed(steps, fitted.links if fitted else links, shared, traffic)
            figures["step_errors"] = found_speed.errors.tolist()
            _show_speed(console, found_speed)
            speed = found_speed.speed
        elif compute_ms is not None:
            speed = Speed(compute_ms / 1e3 / planned.flops)
        elif flops:
            speed = Speed(1 / _flops(flops) / cluster.sharing)
        found = planned.places(speed)
        _show(console, found)
        figures["placements"] = [_plain(each) | {"step": each.step} for each in found]
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def parse_link(option: str, text: str) -> tuple[float, float | None]:
    """Bytes a second and, where there is one, latency in seconds. Raises UserError for other units."""
    from moeport.errors import UserError

    first, comma, second = text.partition(",")
    bandwidth, latency = BANDWIDTH.fullmatch(first), LATENCY.fullmatch(second)
    if bandwidth is None or float(bandwidth[1]) == 0 or (comma and latency is None):
        raise UserError(
            f"{option} {text!r} is not a link; expected bandwidth and latency such as 25GB/s,5us: bandwidth in MB/s, "
            "GB/s or TB/s of bytes or Mbit/s or Gbit/s of bits, latency in ns, us, ms or s"
        )
    bits = 8 if bandwidth[3] == "bit/s" else 1
    return (
        float(bandwidth[1]) * SCALES[bandwidth[2]] / bits,
        float(latency[1]) * SECONDS[latency[2]] if latency else None,
    )


def _links(fitted: Fit | None, nodes: int, intra: str | None, inter: str | None) -> Links:
    """Those that are given, else those fitted."""
    from dataclasses import replace

    import numpy as np

    from moeport.errors import UserError
    from moeport.plan.cost import Link, Links

    found = {}
    for name, text in (("intra", intra), ("inter", inter)):
        known = getattr(fitted.links, name) if fitted else None
        if text is not None:
            bandwidth, latency = parse_link(f"--{name}", text)
            if latency is None:
                if known is None:
                    raise UserError(f"--{name} {text!r}: has no latency; expected one such as {text},5us")
                latency = known.latency
            known = replace(known.at(bandwidth), latency=latency) if known else Link(latency, bandwidth)
        if known is None and name == "inter" and nodes == 1:
            known = Link(0.0, np.inf)
        if known is None:
            raise UserError(
                f"--{name}: the link is not known; expected --{name} with bandwidth and latency such as 25GB/s,5us, or "
                "--from with a file of moeport bench comm --json"
            )
        if name == "inter" and nodes > 1 and known == Link(0.0, np.inf):
            raise UserError(
                "--inter: the files of --from have no traffic between nodes; expected --inter with bandwidth and "
                "latency such as 25GB/s,5us, or a file of several nodes"
            )
        found[name] = known
    return Links(found["intra"], found["inter"], fitted.links.copies if fitted else Links.copies)


def _speed(steps: Sequence[str], links: Links, shares: Sharing, traffic: str) -> SpeedFit:
    """Fitted to runs, on clusters of these links."""
    from functools import partial

    import numpy as np

    from moeport.errors import UserError
    from moeport.plan.compute import fit_speed
    from moeport.plan.planner import Cluster, Planner
    from moeport.plan.routes import routes
    from moeport.training.metrics import read_metrics
    from moeport.training.run_dir import METRICS_FILE, read_config

    found = []
    for text in steps:
        parts = STEP.fullmatch(text)
        if parts is None:
            raise UserError(
                f"--step {text!r} is not a run and its cluster; expected the run.dir, the nodes and the ranks of each "
                "such as runs/small@2x4"
            )
        folder = Path(parts[1])
        config, cluster = read_config(folder), Cluster(int(parts[2]), int(parts[3]), links, shares)
        seconds = [record.step_time for record in read_metrics(folder / METRICS_FILE)[0][FIRST_STEPS:]]
        if not seconds:
            raise UserError(f"--step {text}: has no step after the first {FIRST_STEPS}; expected a longer run")
        planned = Planner(config, _vocab_size(config), cluster, partial(routes, traffic))
        found.append(planned.measured(float(np.median(seconds))))
    return fit_speed(found)


def _flops(text: str) -> float:
    from moeport.errors import UserError

    found = FLOPS.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--flops {text!r} is not a number; expected operations a second such as 150T or 1.2P")
    return float(found[1]) * SCALES[found[2]]


def _vocab_size(config: Any) -> int:
    """That of the config, or of a tokenizer that says it."""
    from moeport.errors import UserError

    tokenizer = config.data.tokenizer
    size = config.model.vocab_size or {"byte": 257, "bpe": getattr(tokenizer, "vocab_size", None)}.get(tokenizer.name)
    if size is None:
        raise UserError("model.vocab_size: is only known to the tokenizer's file; add --set model.vocab_size=N")
    return size


def _exchanges(console: Console, cluster: Cluster, samples: Sequence[Sample], traffic: str) -> list[dict[str, Any]]:
    """The exchanges that were measured, on this cluster with all its ranks sharing the experts."""
    from rich import box
    from rich.table import Table

    from moeport.comm.exchange import EXCHANGES
    from moeport.comm.load import Layout
    from moeport.errors import UserError
    from moeport.plan.planner import exchange_costs, reason
    from moeport.plan.routes import routes

    layout = Layout(cluster.nodes, cluster.ranks_per_node)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("tokens\na rank", "choices", "experts", *(f"{name}\n(ms)" for name in EXCHANGES)):
        table.add_column(heading, justify="right")
    table.add_column("best, and why")
    figures = []
    for demand in dict.fromkeys(sample.demand for sample in samples if sample.demand):
        if demand.num_experts % layout.ranks:
            raise UserError(
                f"--nodes {layout.nodes} --ranks-per-node {layout.ranks_per_node}: the {demand.num_experts} experts "
                f"of the files do not divide among {layout.ranks} ranks; expected a divisor of {demand.num_experts}"
            )
        rows = routes(traffic, layout, demand)
        costs = exchange_costs(layout, demand, rows, cluster.links, cluster.sharing)
        why = reason(layout, demand, rows, costs)
        table.add_row(
            *(f"{number:,}" for number in (demand.tokens, demand.top_k, demand.num_experts)),
            *(f"{cost.total * 1e3:.2f}" for cost in costs.values()),
            why,
        )
        figures.append(_plain(demand) | {"costs": _plain(costs), "reason": why})
    console.print(table)
    return figures


def _show_links(console: Console, cluster: Cluster, fitted: Fit | None) -> None:
    import numpy as np

    together = {"nothing": "", "node": "; the ranks of a node share its processor", "cluster": "; all on one machine"}
    console.print(
        f"{cluster.ranks:,} ranks: {cluster.nodes:,} nodes x {cluster.ranks_per_node}{together[cluster.shares]}"
    )
    links = cluster.links
    for name, link, unit in (
        ("inside a node", links.intra, "message"),
        ("between nodes", links.inter, "message"),
        ("copies", links.copies, "row"),
    ):
        bandwidth = "no limit seen" if np.isinf(link.bandwidth) else f"{link.bandwidth / 1e9:.3g} GB/s"
        lost = [
            f", {words} {speed / 1e9:.3g} GB/s"
            for words, speed in (("a pair of ranks", link.pair_bandwidth), ("nodes that meet", link.meeting_bandwidth))
            if np.isfinite(speed)
        ]
        console.print(f"  {name:<14} {bandwidth}, {link.latency * 1e6:.3g} us a {unit}{''.join(lost)}")
    if fitted:
        error_S = np.abs(fitted.errors)
        console.print(
            f"  fitted to {len(error_S)} times; median error {np.median(error_S):.0%}, largest {error_S.max():.0%}"
        )


def _show_speed(console: Console, found: SpeedFit) -> None:
    import numpy as np

    speed, error_S = found.speed, np.abs(found.errors)
    words = [
        f"{seconds * scale:.3g} {unit}"
        for seconds, scale, unit in (
            (speed.flop, 1e12, "s a TFLOP"),
            (speed.parameter, 1e9, "ns a parameter"),
            (speed.block, 1e3, "ms a block"),
        )
        if seconds
    ]
    console.print(f"  {'compute':<14} {', '.join(words) or 'no time seen'}")
    console.print(
        f"  fitted to {len(error_S)} runs; median error {np.median(error_S):.0%}, largest {error_S.max():.0%}"
    )


def _show(console: Console, found: Sequence[Placement]) -> None:
    from rich import box
    from rich.table import Table

    has_compute = found[0].compute is not None
    table = Table(box=box.SIMPLE_HEAD)
    headings = [
        "parallelism\n.expert",
        "nodes of\na copy",
        "comm\n.algorithm",
        "comm\n.chunks",
        "a layer's\nexchange (ms)",
    ]
    headings += ["exchanges\n(ms/step)", "gradients\n(ms/step)"]
    headings += ["compute\n(ms/step)", "step\n(ms)"] if has_compute else ["together\n(ms/step)"]
    headings += ["parameters, gradients,\nmoments (GiB)", "activations,\nestimate (GiB)"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in found:
        layer = f"{each.costs[each.algorithm].total * 1e3:,.3f}" if each.algorithm else "-"
        held = each.memory.total - each.memory.activations
        compute = [f"{each.compute * 1e3:,.2f}"] if each.compute is not None else []
        table.add_row(
            str(each.expert),
            str(each.nodes),
            each.algorithm or "-",
            str(each.chunks) if each.algorithm else "-",
            layer,
            f"{each.exchange * 1e3:,.2f}",
            f"{each.gradients * 1e3:,.2f}",
            *compute,
            f"{each.step * 1e3:,.2f}",
            f"{held / 2**30:,.3g}",
            f"{each.memory.activations / 2**30:,.3g}",
        )
    console.print(table)
    best = found[0]
    console.print(f"Fastest: parallelism.expert = {best.expert}. {best.reason}.", soft_wrap=True)
    if len(found) > 1:
        other = found[1]
        console.print(
            f"Next: parallelism.expert = {other.expert}, {other.step / best.step:.2f} times as long: exchanges take "
            f"{_difference(other.exchange - best.exchange)}, gradients {_difference(other.gradients - best.gradients)} "
            f"a step. {other.reason}.",
            soft_wrap=True,
        )


def _difference(seconds: float) -> str:
    return f"{abs(seconds) * 1e3:,.2f} ms {'more' if seconds >= 0 else 'less'}"


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, and null for what has no limit, which JSON cannot say."""
    from dataclasses import asdict, is_dataclass

    import numpy as np

    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isinf(value) else value
