"""An exchange whose traffic is counted."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from moeport.comm.communicator import NUMBERS
from moeport.comm.exchange.base import ExpertExchange
from moeport.comm.traffic import Traffic, Volume
from moeport.core.array import Array
from moeport.core.dispatch import Experts
from moeport.core.ops import Ops
from moeport.core.routing import Routing


class CountedExchange:
    """An exchange whose traffic for one layer is counted.

    Args:
        exchange: what carries the rows; layers may share it.
    """

    def __init__(self, exchange: ExpertExchange):
        self.exchange = exchange
        communicators = dict.fromkeys((exchange.communicator, *exchange.communicators))
        self._traffic = [
            (communicator, Traffic(communicator.rank, communicator.nodes)) for communicator in communicators
        ]

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """See ExpertExchange."""
        with self._counting():
            return self.exchange(ops, x_TD, routing, experts)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """See ExpertExchange."""
        with self._counting():
            return self.exchange.of_rows(ops, x_RD, counts_E, experts)

    def forget(self) -> None:
        """Start counting again: what an evaluation sent is not part of a step."""
        for _, traffic in self._traffic:
            traffic.reset()

    def sent(self) -> Volume:
        """What this rank sent to others since `forget`, forward and backward: rows of hidden states, and bytes of all,
        counts and gates included.
        """
        total = Volume()
        for _, traffic in self._traffic:
            for name, volume in traffic.volumes.items():
                total += replace(volume, intra_node_rows=0, inter_node_rows=0) if name == NUMBERS else volume
        return total

    def _counting(self) -> ExitStack:
        stack = ExitStack()
        for communicator, traffic in self._traffic:
            stack.enter_context(communicator.counting(traffic))
        return stack
