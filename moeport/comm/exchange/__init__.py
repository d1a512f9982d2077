"""The all-to-all of experts that are spread over ranks: tokens to their experts, outputs back.

Rank r of W holds the experts r * E / W .. (r + 1) * E / W - 1. All algorithms are written over the communicator's
`start_all_to_all`, so they are differentiable and the same on every backend, and give the same outputs but for the
order of summation. Orders and splits are computed on the host from counts, which are exchanged first.

A new algorithm is a module here, with a subclass of `ExpertExchange` that moves the rows and says what that costs and
why it is fast, and its class in `EXCHANGES`. Configs, benchmarks, planner, documentation and shared tests then know it.
"""

from __future__ import annotations

from moeport.comm.exchange.base import ExpertExchange
from moeport.comm.exchange.counted import CountedExchange
from moeport.comm.exchange.flat import FlatExchange
from moeport.comm.exchange.hierarchical import HierarchicalExchange
from moeport.comm.exchange.node_dedup import NodeDedupExchange
from moeport.comm.load import Demand, Layout, Load, Routes, Stages

EXCHANGES: dict[str, type[ExpertExchange]] = {
    exchange.name: exchange
    for exchange in (
        FlatExchange,
        HierarchicalExchange,
        NodeDedupExchange,
    )
}
"""Algorithms by name."""

__all__ = [
    "EXCHANGES",
    "CountedExchange",
    "ExpertExchange",
    "FlatExchange",
    "HierarchicalExchange",
    "NodeDedupExchange",
    "loads",
]


def loads(algorithm: str, layout: Layout, demand: Demand, routes: Routes, sharing: int = 1) -> list[Load]:
    """The stages of one exchange; see `Stages` and `ExpertExchange.load`.

    Args:
        algorithm: of EXCHANGES.
        layout: ranks and nodes.
        demand: tokens and experts.
        routes: its rows.
        sharing: consecutive ranks that share one processor.

    Raises ValueError for another name.
    """
    if algorithm not in EXCHANGES:
        raise ValueError(f"exchange {algorithm!r} does not exist; expected {', '.join(EXCHANGES)}")
    return EXCHANGES[algorithm].load(Stages(layout, demand, routes, sharing))
