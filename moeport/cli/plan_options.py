"""Parses the options of `moeport plan`: links, speeds and runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moeport.comm.load import Sharing
from moeport.config import Config
from moeport.config.data import known_vocab_size
from moeport.convert.export_options import parse_size
from moeport.errors import UserError
from moeport.paths import expanded
from moeport.plan.compute import Speed, SpeedFit, fit_speed
from moeport.plan.cost import Cluster, Link, Links
from moeport.plan.fit import Fit, Sample
from moeport.plan.memory import Limits
from moeport.plan.planner import Planner
from moeport.plan.routes import routes
from moeport.training.metrics import StepMetrics, iterate_metrics
from moeport.training.run_dir import METRICS_FILE, read_config

BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(B/s|bit/s)")
LATENCY = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s)")
FLOPS = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)")
STEP = re.compile(r"(.+)@([1-9]\d*)x([1-9]\d*)")
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
FIRST_STEPS = 3
"""Steps at the start of a run that are left out, since they take longer."""
LEAST_MEMORY = 10**6
"""Bytes below which a size lacks its unit."""
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_link(option: str, text: str) -> tuple[float, float | None]:
    """Bytes per second, and the latency in seconds if there is one. Raises UserError for other units."""
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


def given_links(fitted: Fit | None, nodes: int, intra: str | None, inter: str | None) -> Links:
    """The given links, or else the fitted ones. Raises UserError for a link that is neither given nor fitted."""
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


def fitted_speed(steps: Sequence[str], links: Links, shares: Sharing, traffic: str) -> SpeedFit:
    """The speed fitted to runs on clusters with these links."""
    found = []
    for text in steps:
        parts = STEP.fullmatch(text)
        if parts is None:
            raise UserError(
                f"--step {text!r} is not a run and its cluster; expected the run.dir, the number of nodes and the "
                "ranks per node, such as runs/small@2x4"
            )
        folder = Path(expanded(parts[1]))
        config, cluster = read_config(folder), Cluster(int(parts[2]), int(parts[3]), links, shares)
        records = iterate_metrics(folder / METRICS_FILE)
        seconds = [record.step_time for record in records if isinstance(record, StepMetrics)][FIRST_STEPS:]
        if not seconds:
            raise UserError(f"--step {text}: has no step after the first {FIRST_STEPS}; expected a longer run")
        planned = Planner(config, vocabulary(config), cluster, partial(routes, traffic))
        found.append(planned.measured(float(np.median(seconds))))
    return fit_speed(found)


def parse_flops(text: str) -> float:
    """Operations per second. Raises UserError if the text is not a number."""
    found = FLOPS.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--flops {text!r} is not a number; expected operations per second such as 150T or 1.2P")
    return float(found[1]) * SCALES[found[2]]


def vocabulary(config: Config) -> int:
    """Vocabulary size from the config, or else from the tokenizer's section."""
    size = config.model.vocab_size or known_vocab_size(config.data)
    if size is None:
        raise UserError("model.vocab_size: is only known to the tokenizer's file; add --set model.vocab_size=N")
    return size


def memory_limits(config: Config, ranks_per_node: int, text: str | None) -> Limits:
    """The memory of an accelerator and of a node, as far as it is given. Raises UserError for what is not a size."""
    on_cpu = config.backend.device == "cpu"
    sizes: list[float] = [parse_size(part) for part in text.split(",")] if text else []
    if len(sizes) > 2 - on_cpu:
        raise UserError(
            f"--memory {text}: expected the memory of {'a node' if on_cpu else 'an accelerator, and of a node'}, as in "
            f"{'512GB' if on_cpu else '80GB,512GB'}"
        )
    for size in sizes:
        if size < LEAST_MEMORY:
            raise UserError(
                f"--memory {text}: {size:,.0f} bytes are too few; expected sizes with units, as in 80GB,512GB"
            )
    return Limits(ranks_per_node, on_cpu, *[float("inf")] * on_cpu, *sizes)


def sharing(samples: Sequence[Sample]) -> Sharing:
    """Which ranks shared a processor when the samples were measured. Raises UserError if the samples disagree."""
    shares = {sample.shares for sample in samples} or {"nothing"}
    if len(shares) > 1:
        raise UserError("--from: some files are of an emulated cluster or of CPUs and some are not; expected one kind")
    return shares.pop()


@dataclass(frozen=True)
class GivenSpeed:
    """How fast a rank computes, as given by the user; empty if unknown.

    Raises UserError if more than one of the options is given.
    """

    compute_ms: float | None = None
    """Milliseconds that one rank computes per step."""
    flops: str | None = None
    """Operations of a rank per second, such as `150T`."""
    steps: tuple[str, ...] = ()
    """Runs and their clusters, such as `runs/small@2x4`."""

    def __post_init__(self) -> None:
        if sum((self.compute_ms is not None, bool(self.flops), bool(self.steps))) > 1:
            raise UserError("--compute-ms, --flops and --step all say how long a rank computes; expected one of them")

    def fitted(self, links: Links, shares: Sharing, traffic: str) -> SpeedFit | None:
        """The speed fitted to the runs, on clusters with these links; None without runs."""
        return fitted_speed(self.steps, links, shares, traffic) if self.steps else None

    def speed(self, planner: Planner) -> Speed | None:
        """The given speed; None if there is none."""
        if self.compute_ms is not None:
            return Speed(self.compute_ms / 1e3 / planner.flops)
        return Speed(1 / parse_flops(self.flops) / planner.cluster.sharing) if self.flops else None
