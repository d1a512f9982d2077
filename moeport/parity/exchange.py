"""Exchanges that carry tokens to experts and back, recorded from outside.

Inside, each algorithm and each number of ranks computes differently. What comes back is the same, and so is the number
of rows of the whole batch that each expert computes.
"""

from __future__ import annotations

from collections.abc import Callable

from moeport.core.array import Array
from moeport.core.dispatch import Exchange, Experts, combine, dispatch
from moeport.core.ops import Ops
from moeport.core.routing import Routing
from moeport.parity.recorder import Recorder

NOTE = "rows sent to experts and back are not recorded, only the results and the number of rows per expert"
"""Note in the report."""


class LocalExchange:
    """The exchange of a process that holds all experts."""

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """The experts' outputs, combined per token, (T, D)."""
        x_RD, counts_E, plan = dispatch(ops, x_TD, routing)
        return combine(ops, experts(x_RD, counts_E), routing, plan)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """The experts' outputs for rows sorted by expert, (R, D)."""
        return experts(x_RD, counts_E)


class RecordedExchange:
    """An exchange of which only the result is recorded.

    Args:
        exchange: the exchange to record.
        recorder: takes the records.
    """

    def __init__(self, exchange: Exchange, recorder: Recorder):
        self.exchange, self.recorder = exchange, recorder

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """The exchange's result for tokens, (T, D), which is recorded."""
        read = [("x_TD", x_TD), ("expert_N", routing.expert_N), ("weight_N", routing.weight_N)]
        return self._recorded(ops, read, lambda inner: self.exchange(inner, x_TD, routing, experts))

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """The exchange's result for rows sorted by expert, (R, D), which is recorded."""
        read = [("x_RD", x_RD), ("counts_E", counts_E)]
        return self._recorded(ops, read, lambda inner: self.exchange.of_rows(inner, x_RD, counts_E, experts))

    def _recorded(self, ops: Ops, read: list[tuple[str, Array]], run: Callable[[Ops], Array]) -> Array:
        inner = ops.unrecorded()
        if inner is ops:
            return run(ops)
        name = self.recorder.operation_name("exchange", ())
        inputs = self.recorder.inputs(inner, name, read)
        out = run(inner)
        self.recorder.output(inner, name, "exchange", out, inputs)
        return out
