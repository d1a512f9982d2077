"""The Communicator: ranks, groups and collectives, with their checks."""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from types import TracebackType
from typing import Any, ClassVar, NoReturn

import numpy as np

from moeport.comm.agreement import Topic
from moeport.comm.job import Job
from moeport.comm.liveness import Call, Liveness
from moeport.comm.traffic import Traffic
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.errors import DisagreementError

TIMEOUT_SECONDS = 600.0
"""Longest time that a collective may take before the job is stopped."""
OPERATIONS = ("sum", "max")
NUMBERS = "all_to_all of numbers"
"""Name under which traffic counts exchanges of one-dimensional arrays."""
Pending = Callable[[], Array]
"""Waits for rows in flight and returns them."""


class Communicator(ABC):
    """Collectives among a group of ranks, on arrays of one backend.

    Every rank of the communicator must call the same collectives in the same order, with arrays of the same type. A
    collective returns a new array and leaves its argument unchanged. `all_to_all` is differentiable; results of the
    others are constants under differentiation. Arrays have the backend's index type or one of its float types.

    An error in a collective, the death of a process, or a collective that exceeds the timeout stops every process of
    the job with one message. Use the communicator as a context manager: leaving the block says goodbye, and an
    exception in the block stops every rank with its message.

    A backend implements the protected methods, which neither count traffic nor check for errors.
    """

    checks_splits: bool
    """Whether ranks compare their splits before each `all_to_all`.

    When splits do not match, host libraries silently return wrong values or abort the process. On an accelerator the
    comparison would wait for the device, and mismatched splits show up as a collective that never ends.
    """

    library: str = "no library"
    """Name of the communication library, for messages."""

    needs_link: ClassVar[bool] = False
    """Whether a rank takes part in the gradient of an exchange only if its own rows depend on what is differentiated.

    See `link`.
    """

    def __init__(self, ops: Ops, ranks: Sequence[int], global_rank: int):
        self.ops = ops
        self.link: Array | None = None
        """A zero of shape (1,) that depends on what is differentiated. While set, it passes through each exchange, so
        that the exchange's gradient is computed whenever the link's is, whatever the rows depend on."""
        self.ranks = tuple(ranks)
        """Global ranks of the members by position, ascending."""
        self.rank = self.ranks.index(global_rank)
        """Position of this process in `ranks`."""
        self.size = len(self.ranks)
        self.nodes: tuple[int, ...] = (0,) * self.size
        """Node number of each position."""
        self.traffic = Traffic(self.rank, self.nodes)
        """Bytes sent by each collective."""
        self._liveness: Liveness | None = None
        self._owned: Job | None = None
        self._calls = 0

    def join(self, job: Job, owned: bool) -> None:
        """Lets a job watch the collectives, and learns from it which ranks share a node.

        A backend calls this on the communicator of all ranks before returning it.

        Args:
            job: of the same ranks.
            owned: whether the job ends with this communicator.
        """
        self._liveness, self._owned = job.liveness, job if owned else None
        self._locate(job.nodes)

    def _locate(self, nodes: Sequence[int]) -> None:
        self.nodes = tuple(nodes)
        self.traffic = Traffic(self.rank, self.nodes)

    # ------------------------------------------------------------------ public

    def group(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Divides the ranks into groups and returns the group of this rank, with its ranks in ascending order.

        Every rank of this communicator passes the same `partition`: lists of global ranks that contain each rank of
        this communicator once.

        Raises ValueError for an invalid partition, and on every rank if the ranks disagree.
        """
        named = [rank for ranks in partition for rank in ranks]
        if sorted(named) != sorted(self.ranks):
            raise ValueError(
                f"group: each of the ranks {_joined(self.ranks)} must be in the partition exactly once "
                f"(got {[list(ranks) for ranks in partition]})"
            )
        checksum = zlib.crc32(repr([list(ranks) for ranks in partition]).encode()) >> 1
        with self._collective("group", f"partition {[list(ranks) for ranks in partition]}"):
            seen = self._gather_integers([checksum])[:, 0]
            if (seen != seen[0]).any():
                raise ValueError("the ranks passed different partitions; pass the same one on every rank")
            mine = sorted(next(ranks for ranks in partition if self.ranks[self.rank] in ranks))
            group = self._group(tuple(mine))
        group._liveness = self._liveness
        group._locate([self.nodes[self.ranks.index(rank)] for rank in mine])
        return group

    def all_reduce(self, x: Array, op: str = "sum") -> Array:
        """Reduces arrays of equal shape elementwise by `op`, sum or max. Returns the same array on every rank."""
        if op not in OPERATIONS:
            raise ValueError(f"all_reduce: op is {op!r}; expected one of {', '.join(OPERATIONS)}")
        block = -(-_rows(x) // self.size)
        self._count("all_reduce", [2 * block] * self.size, x)
        with self._collective("all_reduce", f"{op} of {self._describe(x)}"):
            return self._all_reduce(x, op)

    def all_gather(self, x: Array) -> Array:
        """Stacks arrays of equal shape in rank order. Returns (size, *x.shape)."""
        self._count("all_gather", [_rows(x)] * self.size, x)
        with self._collective("all_gather", self._describe(x)):
            return self._all_gather(x)

    def broadcast(self, x: Array, source: int) -> Array:
        """Returns the array of the rank at position `source`. On other ranks `x` provides only shape and type."""
        if not 0 <= source < self.size:
            raise ValueError(f"broadcast: source is {source}; expected a position of 0 .. {self.size - 1}")
        self._count("broadcast", [_rows(x) if self.rank == source else 0] * self.size, x)
        with self._collective("broadcast", f"{self._describe(x)} from position {source}"):
            return self._broadcast(x, source)

    def reduce_scatter(self, x: Array) -> Array:
        """Sums arrays (size * n, ...) of equal shape; each position receives its n rows. Returns (n, ...)."""
        if not x.shape or x.shape[0] % self.size:
            raise ValueError(f"reduce_scatter: x is {tuple(x.shape)}; expected a multiple of {self.size} rows")
        self._count("reduce_scatter", [x.shape[0] // self.size] * self.size, x)
        with self._collective("reduce_scatter", self._describe(x)):
            return self._reduce_scatter(x)

    def sum_of_numbers(self, values: np.ndarray) -> np.ndarray:
        """Sums float64 host values over the ranks, in rank order and float64 precision whatever types the library can
        add.
        """
        if self.size == 1:
            return values
        rest, parts = values.astype(np.float64), []
        for _ in range(3):  # three float32 hold a float64
            parts.append(rest.astype(np.float32))
            with np.errstate(invalid="ignore"):
                rest = np.where(np.isfinite(parts[-1]), rest - parts[-1], 0.0)  # nothing is left of an infinity
        gathered = self.ops.to_numpy(self.all_gather(self.ops.from_numpy(np.stack(parts))))
        return gathered.astype(np.float64).sum((0, 1))

    def barrier(self) -> None:
        """Waits until every rank has entered the barrier."""
        with self._collective("barrier"):
            self._barrier()

    def all_to_all(
        self, x: Array, send_rows: Sequence[int] | np.ndarray, receive_rows: Sequence[int] | np.ndarray
    ) -> Array:
        """Calls `start_all_to_all` and waits for the rows."""
        return self.start_all_to_all(x, send_rows, receive_rows)()

    def start_all_to_all(
        self, x: Array, send_rows: Sequence[int] | np.ndarray, receive_rows: Sequence[int] | np.ndarray
    ) -> Pending:
        """Starts sending each rank its rows; differentiable.

        If the library communicates asynchronously, several exchanges can be in flight at once, and so can their
        gradients: the backward pass starts an exchange where the forward pass waited for it and waits where it began.

        Args:
            x: (R, ...), the rows for position 0, then those for position 1, and so on.
            send_rows: number of rows to send to each position, summing to R; may contain zeros.
            receive_rows: number of rows to receive from each position, as given in that rank's `send_rows`.

        Returns: a function that waits for the rows and returns them, (sum(receive_rows), ...): those from position 0,
        then those from position 1, and so on. Call it once.

        The gradient is the reverse exchange, in which every rank must take part: `x` must depend on what is
        differentiated on all ranks or on none, or `link` must be set. PyTorch's `backward` takes part for constant rows
        as well.
        """
        send, receive = tuple(map(int, send_rows)), tuple(map(int, receive_rows))
        for name, rows in (("send_rows", send), ("receive_rows", receive)):
            if len(rows) != self.size or min(rows) < 0:
                raise ValueError(f"all_to_all: {name} is {list(rows)}; expected {self.size} numbers of at least 0")
        if not x.shape or sum(send) != x.shape[0]:
            raise ValueError(f"all_to_all: send_rows {list(send)} must sum to the rows of x, which is {tuple(x.shape)}")
        return self._differentiable(Transfer(self, self.traffic, send, receive), x)

    @contextmanager
    def counting(self, traffic: Traffic) -> Iterator[None]:
        """Counts collectives called in the block in `traffic`, and the gradients of its exchanges whenever they run."""
        before, self.traffic = self.traffic, traffic
        try:
            yield
        finally:
            self.traffic = before

    def agree(self, *topics: Topic) -> None:
        """Compares what every rank of the job must have alike; for the communicator of all ranks, which all call it.

        Raises DisagreementError, the same on every rank, with the values of each, if something differs.
        """
        if self._liveness is not None:
            self._liveness.agree(topics)

    def wait_for_all(self) -> None:
        """Waits until every rank of the job has called this, for however long, without the communication library.

        For the communicator of all ranks, when some have work that may take hours. If one fails or dies, all stop.
        """
        if self._liveness is not None:
            self._liveness.agree((), is_patient=True)

    def on_any_rank(self, holds: bool) -> bool:
        """Whether something holds on any rank of the job; the ranks ask each other without the communication library.

        For the communicator of all ranks, which all call it.
        """
        try:
            self.agree(Topic("", {"it": holds}))
        except DisagreementError:
            return True
        return holds

    def compose_all_to_all(self) -> bool:
        """From now on, here and in groups formed later, exchange rows by messages between pairs of ranks.

        Returns: whether the backend can. By default it cannot.
        """
        return False

    def fail(self, error: Exception) -> NoReturn:
        """Stops every rank with the message of `error`; does not return.

        The error is raised in a single process, and where all ranks fail with the same error of moeport's.
        """
        if self._liveness is None:
            raise error
        self._liveness.fail(error)

    def close(self) -> None:
        """Waits for every rank, then leaves without alarming the others. For the communicator of all ranks."""
        self.barrier()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            self.fail(error)

    # ------------------------------------------------------------------ implemented by a backend

    @abstractmethod
    def _group(self, ranks: tuple[int, ...]) -> Communicator:
        """A communicator of some of the ranks, called by its members only."""

    @abstractmethod
    def _all_reduce(self, x: Array, op: str) -> Array:
        """See all_reduce."""

    @abstractmethod
    def _all_gather(self, x: Array) -> Array:
        """See all_gather."""

    @abstractmethod
    def _broadcast(self, x: Array, source: int) -> Array:
        """See broadcast."""

    def _reduce_scatter(self, x: Array) -> Array:
        """See reduce_scatter. By default, an all_to_all and a sum in rank order."""
        n = x.shape[0] // self.size
        parts = self._all_to_all(x, (n,) * self.size, (n,) * self.size)
        total = parts[:n]
        for rank in range(1, self.size):
            total = total + parts[rank * n : (rank + 1) * n]
        return total

    @abstractmethod
    def _barrier(self) -> None:
        """See barrier."""

    @abstractmethod
    def _all_to_all(self, x: Array, send: tuple[int, ...], receive: tuple[int, ...]) -> Array:
        """The exchange of all_to_all, without a gradient."""

    def _start_all_to_all(
        self, x: Array, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> tuple[Array, Callable[[], object]]:
        """A placeholder for the rows, and a function that waits for them. By default they are complete at once."""
        return self._all_to_all(x, send, receive), lambda: None

    @abstractmethod
    def _differentiable(self, transfer: Transfer, x: Array) -> Pending:
        """Starts the transfer of `x` as a function whose gradient is `transfer.back`."""

    # ------------------------------------------------------------------ checks

    def _check_splits(self, x: Array, send: tuple[int, ...], receive: tuple[int, ...]) -> None:
        rows = self._gather_integers([_row_bytes(self.ops, x), *send, *receive])
        widths, sent, expected = rows[:, 0], rows[:, 1 : 1 + self.size], rows[:, 1 + self.size :]
        if (widths != widths[0]).any():
            raise ValueError(f"a row has {_joined(widths)} bytes on ranks {_joined(self.ranks)}; expected one width")
        for source, target in np.argwhere(sent != expected.T):
            raise ValueError(
                f"rank {self.ranks[source]} sends {sent[source, target]} rows to rank {self.ranks[target]}, "
                f"which expects {expected[target, source]}"
            )

    def _gather_integers(self, values: Sequence[int]) -> np.ndarray:
        """Integers below 2^31 of every rank, (size, n)."""
        return self.ops.to_numpy(self._all_gather(self.ops.from_numpy(np.array(values, np.int64))))

    @contextmanager
    def _collective(self, name: str, detail: str = "") -> Iterator[None]:
        with self._watched(self._call(name, detail)):
            yield

    def _call(self, name: str, detail: str) -> Call:
        self._calls += 1
        return Call(self.ranks, self._calls, name, detail)

    @contextmanager
    def _watched(self, call: Call) -> Iterator[None]:
        with self.ops.part("communication"), self._liveness.call(call) if self._liveness else nullcontext():
            yield

    def _count(self, name: str, rows: Sequence[int], x: Array) -> None:
        self.traffic.add(name, rows, _row_bytes(self.ops, x))

    def _describe(self, x: Array) -> str:
        return f"{self.ops.dtype(x)} {tuple(x.shape)}"


class Transfer:
    """One all_to_all, checked and counted, which backends make differentiable.

    Args:
        communicator: the ranks that exchange rows.
        traffic: counts the transfer and its gradient.
        send: number of rows to each position.
        receive: number of rows from each position.
    """

    def __init__(self, communicator: Communicator, traffic: Traffic, send: tuple[int, ...], receive: tuple[int, ...]):
        self.communicator, self.traffic, self.send, self.receive = communicator, traffic, send, receive

    @cached_property
    def back(self) -> Transfer:
        """The reverse transfer, which carries the gradient."""
        return Transfer(self.communicator, self.traffic, self.receive, self.send)

    def start(self, x: Array) -> Array:
        """Starts the send; returns a placeholder until `wait` completes it."""
        communicator, send, receive = self.communicator, self.send, self.receive
        row_bytes = _row_bytes(communicator.ops, x)
        self._volume = self.traffic.add("all_to_all" if x.shape[1:] else NUMBERS, send, row_bytes)
        detail = f"{communicator._describe(x)}, sends {_joined(send)}, receives {_joined(receive)}"
        self._call = communicator._call("all_to_all", detail)
        with self._timed():
            if communicator.checks_splits:
                communicator._check_splits(x, send, receive)
            out, self._finish = communicator._start_all_to_all(x, send, receive)
        self._out = out
        return out

    def wait(self) -> Array:
        """Waits for the rows and returns them."""
        with self._timed():
            self._finish()
        out = self._out
        del self._out, self._finish
        return out

    def run(self, x: Array) -> Array:
        """Starts the transfer and waits for it."""
        self.start(x)
        return self.wait()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        with self.communicator._watched(self._call):
            yield
        self._volume.seconds += time.perf_counter() - started


ITEM_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8}


def _rows(x: Array) -> int:
    return x.shape[0] if x.shape else 1


def _row_bytes(ops: Ops, x: Array) -> int:
    return int(np.prod(x.shape[1:], dtype=np.int64)) * ITEM_BYTES[ops.dtype(x)]


def _joined(numbers: Any) -> str:
    return ",".join(str(number) for number in numbers)
