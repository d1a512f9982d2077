"""Latency and bandwidth of each link class from what `moeport bench comm` measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from moeport.comm.communicator import ITEM_BYTES
from moeport.comm.exchange import EXCHANGES, loads
from moeport.comm.load import Demand, Layout, Load, Routes, Sharing, all_reduce_load, ranks_sharing
from moeport.errors import UserError
from moeport.plan.bench_file import ALL_REDUCE, read_bench
from moeport.plan.cost import Link, Links

RoutesOf = Callable[[str, Layout, Demand], Routes]
"""Rows of an exchange, from the text of `--traffic`."""
ROUNDS = 50
TIE = 1e-12
"""Squared residuals of relative times that count as equal."""


@dataclass(frozen=True)
class Sample:
    """One measured exchange, or all-reduce."""

    algorithm: str
    layout: Layout
    demand: Demand | None
    """Of an exchange."""
    traffic: str
    shares: Sharing
    loads: list[Load]
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Links, and how far their times are from the measured ones."""

    links: Links
    errors: np.ndarray
    """Per sample: fitted over measured time, less 1."""


def read_samples(path: Path, routes_of: RoutesOf) -> list[Sample]:
    """The exchanges and all-reduces in a file of `moeport bench comm --json`.

    Raises UserError for another file, or one without exchanges.
    """
    about, rows = read_bench(path)
    nodes, ranks = len(set(about["nodes"])), about["ranks"]
    samples = [_sample(about, row, Layout(nodes, ranks // nodes), routes_of) for row in rows]
    if not any(sample.demand for sample in samples):
        raise UserError(
            f"--from {path}: has no exchange of experts; expected one of {', '.join(EXCHANGES)}: run "
            "moeport bench comm with them"
        )
    return samples


def _sample(about: dict[str, Any], row: dict[str, Any], layout: Layout, routes_of: RoutesOf) -> Sample:
    operation, seconds = row["operation"], row["time_us"] / 1e6
    shares: Sharing = "nothing" if not about["device"].startswith("cpu") else "cluster" if about["emulated"] else "node"
    sharing = ranks_sharing(shares, layout)
    if operation == ALL_REDUCE:
        found = [all_reduce_load(layout, row["size"], sharing)]
        return Sample(operation, layout, None, about["traffic"], shares, found, seconds)
    row_bytes = about["width"] * ITEM_BYTES[row["type"]]
    demand = Demand(row["size"] // row_bytes, about["top_k"], about["experts"], row_bytes, about["backward"])
    found = loads(operation, layout, demand, routes_of(about["traffic"], layout, demand), sharing)
    return Sample(operation, layout, demand, about["traffic"], shares, found, seconds)


def fit(samples: Sequence[Sample]) -> Fit:
    """The links whose times have the least sum of squared relative errors; no latency or bandwidth is negative.

    The time is linear in latencies and reciprocal bandwidths once it is known in each stage whether the bytes inside
    nodes or those between them take longer. So each round solves for them, and the next decides by the solution; the
    best of all rounds counts. A bandwidth is infinite where its bytes never decide.
    """
    seconds_S = np.array([sample.seconds for sample in samples])
    best = None
    for links in (Links(Link(0, 1), Link(0, np.inf)), Links(Link(0, np.inf), Link(0, 1))):  # what is decided first by
        decided: set[bytes] = set()
        for _ in range(ROUNDS):
            terms_SF = np.array([_terms(sample.loads, links) for sample in samples])
            if terms_SF.tobytes() in decided:
                break
            decided.add(terms_SF.tobytes())
            links = _links(non_negative_least_squares(terms_SF / seconds_S[:, None], np.ones(len(samples))))
            times_S = np.array([links.cost(sample.loads).total for sample in samples])
            found = Fit(links, times_S / seconds_S - 1)
            if best is None or np.square(found.errors).sum() < np.square(best.errors).sum():
                best = found
    assert best is not None
    return best


def _terms(found: Sequence[Load], links: Links) -> np.ndarray:
    """Coefficients of the unknowns of `_links`, (8,)."""
    total_F = np.zeros(8)
    for load in found:
        inside, across = links.transfers(load)
        between = across > inside
        total_F += (
            load.meeting_bytes if between else 0.0,
            load.pair_bytes if between else 0.0,
            load.intra_messages,
            load.inter_messages,
            0.0 if between else load.intra_bytes,
            load.inter_bytes if between else 0.0,
            load.copied_rows,
            load.copied_bytes,
        )
    return total_F


def _links(solution_F: np.ndarray) -> Links:
    meeting, pair, intra_s, inter_s, intra, inter, row_s, copied = map(float, solution_F)

    def bandwidth(seconds: float) -> float:
        return 1 / seconds if seconds else np.inf

    return Links(
        intra=Link(intra_s, bandwidth(intra)),
        inter=Link(inter_s, bandwidth(inter), bandwidth(pair), bandwidth(meeting)),
        copies=Link(row_s, bandwidth(copied)),
    )


def non_negative_least_squares(terms_SF: np.ndarray, wanted_S: np.ndarray) -> np.ndarray:
    """x >= 0 (F,) with the least |terms x - wanted|^2, by the active set of Lawson and Hanson (1974).

    Where several x have it, the first entries are 0 as far as they can be.
    """
    size_F = np.linalg.norm(terms_SF, axis=0)
    free = np.flatnonzero(size_F)
    scaled_SF = terms_SF[:, free] / size_F[free]
    columns = np.arange(len(free))
    least = _residual(scaled_SF, wanted_S)
    for column in range(len(free)):
        rest = columns[columns != column]
        if _residual(scaled_SF[:, rest], wanted_S) <= least + TIE:
            columns = rest
    found_F = np.zeros(len(size_F))
    if len(columns):
        found_F[free[columns]] = nnls(scaled_SF[:, columns], wanted_S)[0] / size_F[free[columns]]
    return found_F


def _residual(terms_SF: np.ndarray, wanted_S: np.ndarray) -> float:
    """The least |terms x - wanted|^2."""
    return float(nnls(terms_SF, wanted_S)[1] ** 2 if terms_SF.shape[1] else wanted_S @ wanted_S)
