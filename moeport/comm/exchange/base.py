"""What every exchange of experts shares; see `moeport.comm.exchange`.

Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from moeport.comm.communicator import Communicator
from moeport.comm.exchange.rows import Inner, Steps, as_steps, exchange_rows, in_chunks, linked_run, run_in_turn
from moeport.comm.load import Advantage, Load, Stages
from moeport.core.array import Array
from moeport.core.dispatch import Experts
from moeport.core.ops import Ops
from moeport.core.routing import Routing

BETWEEN_NODES = "rows per token between nodes"


class ExpertExchange(ABC):
    """One all-to-all algorithm.

    Args:
        communicator: the ranks that share the experts.
        num_experts: E, a multiple of the number of ranks.
        chunks: equal, consecutive parts of a rank's tokens that take turns: while the experts compute on one, others
            are under way, where the library sends beside the computation.
    """

    name: ClassVar[str]
    """Of `comm.algorithm`."""
    summary: ClassVar[str]
    """How tokens reach experts on other ranks, for lists and tables."""

    def __init__(self, communicator: Communicator, num_experts: int, chunks: int = 1):
        if num_experts % communicator.size:
            raise ValueError(
                f"{num_experts} experts do not divide among {communicator.size} ranks; expected a multiple of the ranks"
            )
        self.communicator, self.num_experts, self.chunks = communicator, num_experts, chunks

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """Outputs of the experts for the tokens of this rank, weighted by their gates and summed.

        Args:
            ops: the backend's operations.
            x_TD: tokens of this rank, at least one; ranks may have different numbers.
            routing: their assignments to the E experts.
            experts: see `Experts`.

        Returns: (T, D) in the type of x.
        """

        def run() -> Array:
            if self.chunks == 1:
                return run_in_turn([self.exchange(ops, x_TD, routing, as_steps(experts))])[0]
            parts = in_chunks(ops, x_TD, routing, self.chunks)
            return ops.concat(run_in_turn([self.exchange(ops, *part, as_steps(experts)) for part in parts]), axis=0)

        return linked_run(ops, self.communicators, x_TD, run)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """Outputs of the experts for rows of this rank, all at once, straight to their ranks and back.

        Args:
            ops: the backend's operations.
            x_RD: rows sorted by expert, at least one.
            counts_E: rows of each of the E experts.
            experts: see `Experts`.

        Returns: (R, D), in the order of x.
        """
        communicator, counts = self.communicator, ops.to_numpy(counts_E)
        steps = exchange_rows(ops, communicator, x_RD, counts, as_steps(experts))
        return linked_run(ops, [communicator], x_RD, lambda: run_in_turn([steps])[0])

    @property
    def communicators(self) -> tuple[Communicator, ...]:
        """The communicators that carry rows."""
        return (self.communicator,)

    @abstractmethod
    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        """The steps of `__call__` for a part of the tokens, which may be empty."""

    @classmethod
    @abstractmethod
    def load(cls, stages: Stages) -> list[Load]:
        """The stages of one exchange, in order; the copies that a rank makes between them come last."""

    @classmethod
    @abstractmethod
    def why(cls, stages: Stages) -> Advantage | None:
        """What sets it apart from another exchange; None: nothing, such as on one node."""
