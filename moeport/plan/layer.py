"""The exchange of one MoE layer: each algorithm in its best number of chunks, the fastest of them, and why it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeport.comm.exchange import EXCHANGES
from moeport.comm.load import Advantage, Stages
from moeport.plan.cost import Cluster, Cost, Links
from moeport.plan.overlap import overlapped


@dataclass(frozen=True)
class LayerPass:
    """One pass through a layer."""

    stages: Stages
    """Of its exchange."""
    experts: float
    """Seconds that the experts compute in it."""


@dataclass(frozen=True)
class TimedExchange:
    """One algorithm in some number of chunks."""

    algorithm: str
    chunks: int
    seconds: float
    """That it adds to what experts compute, in all passes."""
    hidden: float
    """Share of its time in one chunk that it does not add."""


@dataclass(frozen=True)
class Reason:
    """Why an exchange is the fastest. `moeport.plan.text.sentence` says it."""

    algorithm: str
    chunks: int
    nodes: int
    """That the experts of a copy are on."""
    advantage: Advantage | None
    cause: str
    """Of its time in one chunk, the part that takes longest: a field of `Cost`."""
    cause_share: float
    """Of that time."""
    hidden: float
    """Share of that time that chunks hide."""
    slower: Mapping[str, float]
    """How many times as long each other algorithm takes."""


@dataclass(frozen=True)
class LayerExchange:
    """The fastest exchange of a layer."""

    best: TimedExchange
    costs: Mapping[str, Cost]
    """Of the first pass in one chunk, by algorithm."""
    reason: Reason


def exchange_costs(stages: Stages, links: Links) -> dict[str, Cost]:
    """Time of one exchange by each algorithm."""
    return {name: links.cost(exchange.load(stages)) for name, exchange in EXCHANGES.items()}


def fastest(costs: Mapping[str, Cost]) -> str:
    """The algorithm of least time; of equal ones the first."""
    return min(costs, key=lambda name: costs[name].total)


def fastest_exchange(
    cluster: Cluster, passes: Sequence[LayerPass], algorithms: Sequence[str], chunks: Sequence[int]
) -> LayerExchange:
    """The exchange of a layer that adds least to what its experts compute.

    Args:
        cluster: ranks and links.
        passes: forward and backward in one, then those that are repeated.
        algorithms: to choose from.
        chunks: numbers of chunks to choose from.
    """
    costs = exchange_costs(passes[0].stages, cluster.links)
    timed = [fastest_chunks(name, cluster, passes, chunks) for name in algorithms]
    return LayerExchange(_least(timed), costs, reason(passes[0].stages, costs, timed))


def fastest_chunks(
    algorithm: str, cluster: Cluster, passes: Sequence[LayerPass], chunks: Sequence[int]
) -> TimedExchange:
    """An algorithm in the number of chunks in which it adds least."""
    links = cluster.links
    loads = [EXCHANGES[algorithm].load(each.stages) for each in passes]
    whole = sum(links.cost(load).total for load in loads)
    timed = []
    for number in chunks:
        seconds = sum(
            overlapped(links, load, each.experts, number, cluster.sharing > 1) - each.experts
            for load, each in zip(loads, passes, strict=True)
        )
        timed.append(TimedExchange(algorithm, number, seconds, 1 - seconds / whole if number > 1 else 0.0))
    return _least(timed)


def reason(stages: Stages, costs: Mapping[str, Cost], timed: Sequence[TimedExchange] | None = None) -> Reason:
    """The facts that make the fastest algorithm the fastest.

    Args:
        stages: of the exchange.
        costs: by algorithm, in one chunk.
        timed: those to compare; default: all in one chunk.
    """
    timed = timed or [TimedExchange(name, 1, cost.total, 0.0) for name, cost in costs.items()]
    best = _least(timed)
    cost = costs[best.algorithm]
    cause = max(vars(cost), key=lambda name: getattr(cost, name))
    return Reason(
        algorithm=best.algorithm,
        chunks=best.chunks,
        nodes=stages.layout.nodes,
        advantage=EXCHANGES[best.algorithm].why(stages),
        cause=cause,
        cause_share=getattr(cost, cause) / cost.total,
        hidden=best.hidden,
        slower={each.algorithm: each.seconds / best.seconds for each in timed if each != best},
    )


def _least(timed: Sequence[TimedExchange]) -> TimedExchange:
    return min(timed, key=lambda each: each.seconds)
