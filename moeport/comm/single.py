"""The communicator of a process alone."""

from __future__ import annotations

from moeport.comm.communicator import Communicator, Pending, Transfer
from moeport.core.array import Array
from moeport.core.ops import Ops


class SingleProcess(Communicator):
    """One rank: a collective copies its argument."""

    checks_splits = True

    def __init__(self, ops: Ops):
        super().__init__(ops, (0,), 0)

    def _group(self, ranks: tuple[int, ...]) -> Communicator:
        return SingleProcess(self.ops)

    def _all_reduce(self, x: Array, op: str) -> Array:
        return self.ops.stop_gradient(self._copy(x))

    def _all_gather(self, x: Array) -> Array:
        return self.ops.stop_gradient(self.ops.reshape(self._copy(x), (1, *x.shape)))

    def _broadcast(self, x: Array, source: int) -> Array:
        return self.ops.stop_gradient(self._copy(x))

    def _reduce_scatter(self, x: Array) -> Array:
        return self.ops.stop_gradient(self._copy(x))

    def _barrier(self) -> None:
        pass

    def _all_to_all(self, x: Array, send: tuple[int, ...], receive: tuple[int, ...]) -> Array:
        return self._copy(x)

    def _differentiable(self, transfer: Transfer, x: Array) -> Pending:
        y = transfer.run(x)
        return lambda: y

    def _copy(self, x: Array) -> Array:
        """A differentiable copy; an empty array has nothing to copy."""
        if 0 in x.shape:
            return x
        rows = self.ops.reshape(x, (1, *x.shape))
        return self.ops.reshape(self.ops.take_rows(rows, self.ops.arange(1)), tuple(x.shape))
