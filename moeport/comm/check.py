"""Check the values of every collective before work relies on them.

A library can report success and deliver wrong values: one rounds float64 to float32 in its all-gather, another fills
rows that nobody sent, and native all-to-alls have returned zeros. The values here are exact in their type, sums
included, and use its whole precision, so that every comparison is for equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.comm.agreement import name_ranks
from moeport.comm.communicator import OPERATIONS, Communicator
from moeport.core.array import Array
from moeport.core.ops import FLOAT_DTYPES
from moeport.errors import RunError

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "broadcast",
    "reduce_scatter",
    "all_to_all",
    "all_to_all gradient",
    "barrier",
)
FINE = {"bfloat16": 0.0, "float32": 2.0**-12, "float64": 2.0**-40, "index": 2.0**20}
"""What an integer below 256 is multiplied by and added to, to reach the precision of each type."""
WIDTH = 3
"""Columns of a row."""


@dataclass(frozen=True)
class CheckedCollective:
    """One collective in one type: right, or `check_collectives` would have raised."""

    collective: str
    dtype: str
    arrays: int
    """Results compared on this rank."""
    sent_bytes: int
    """Sent by this rank to others."""


def check_collectives(
    communicator: Communicator,
    dtypes: Sequence[str],
    value_and_grad: Callable[..., Any] | None = None,
    collectives: Sequence[str] = COLLECTIVES,
    versions: Mapping[str, str] | None = None,
) -> list[CheckedCollective]:
    """Run collectives on values that depend on rank and position, and compare with numpy.

    Every rank of the communicator calls it.

    Args:
        communicator: the ranks that take part.
        dtypes: of FLOAT_DTYPES, or `index` for the backend's index type.
        value_and_grad: a backend's, for the gradient of `all_to_all`; without it, or for `index`, that is left out.
        collectives: names of COLLECTIVES.
        versions: a backend's, for the message.

    Raises RunError at the first wrong value, with the collective, type, position, expected and received value, and what
    delivered it.
    """
    results = []
    for result, problem in _results(communicator, dtypes, value_and_grad, collectives):
        if problem:
            raise wrong_values(problem, described(communicator, versions))
        results.append(result)
    return results


def first_wrong(
    communicator: Communicator,
    dtypes: Sequence[str],
    value_and_grad: Callable[..., Any] | None,
    collectives: Sequence[str],
) -> str | None:
    """Describes the first wrong value that this rank receives; None if all are right.

    Takes the arguments of `check_collectives`. All collectives run on every rank, whatever they deliver.
    """
    problems = [problem for _, problem in _results(communicator, dtypes, value_and_grad, collectives)]
    return next(filter(None, problems), None)


def described(communicator: Communicator, versions: Mapping[str, str] | None = None) -> str:
    """The library of a communicator and the versions it came with, such as `gloo; torch 2.13.0, numpy 2.1.0`."""
    listed = ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
    return f"{communicator.library}; {listed}" if listed else communicator.library


def wrong_values(problem: str, library: str) -> RunError:
    """The error for what `first_wrong` found in a library that `described` describes."""
    return RunError(
        f"probe: {problem}; do not train on this communication library ({library}): update it, or use another backend"
    )


def _results(
    communicator: Communicator,
    dtypes: Sequence[str],
    value_and_grad: Callable[..., Any] | None,
    collectives: Sequence[str],
) -> Iterator[tuple[CheckedCollective, str | None]]:
    """Each collective in each type, with the first value that is wrong."""
    for dtype in dtypes:
        for collective in collectives:
            if collective == "all_to_all gradient" and (value_and_grad is None or dtype not in FLOAT_DTYPES):
                continue
            before = _sent(communicator)
            cases = _Cases(communicator, dtype, value_and_grad).of(collective)
            problems = [_difference(communicator, f"{case} of {dtype}", got, want) for case, got, want in cases]
            result = CheckedCollective(collective, dtype, len(problems), _sent(communicator) - before)
            yield result, next(filter(None, problems), None)


class _Cases:
    """The cases of each collective in one type, as (name, received, expected)."""

    def __init__(self, communicator: Communicator, dtype: str, value_and_grad: Callable[..., Any] | None):
        self.communicator, self.dtype, self.value_and_grad = communicator, dtype, value_and_grad
        self.size, self.rank = communicator.size, communicator.rank

    def of(self, collective: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        cases: Iterator[tuple[str, np.ndarray, np.ndarray]] = getattr(self, f"_{collective.replace(' ', '_')}")()
        return cases

    def _all_reduce(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for shape in ((2 * self.size + 1, WIDTH), ()):
            every = [self._values(rank, shape) for rank in range(self.size)]
            for op in OPERATIONS:
                got = self.communicator.all_reduce(self._array(every[self.rank]), op)
                yield f"all_reduce ({op})", self._numpy(got), np.max(every, 0) if op == "max" else np.sum(every, 0)

    def _all_gather(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for shape in ((4, WIDTH), ()):
            every = [self._values(rank, shape) for rank in range(self.size)]
            yield (
                "all_gather",
                self._numpy(self.communicator.all_gather(self._array(every[self.rank]))),
                np.stack(every),
            )

    def _broadcast(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for source in {0, self.size - 1}:
            got = self.communicator.broadcast(self._array(self._values(self.rank, (4, WIDTH))), source)
            yield "broadcast", self._numpy(got), self._values(source, (4, WIDTH))

    def _reduce_scatter(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        every = [self._values(rank, (2 * self.size, WIDTH)) for rank in range(self.size)]
        got = self.communicator.reduce_scatter(self._array(every[self.rank]))
        yield "reduce_scatter", self._numpy(got), np.sum(every, 0)[2 * self.rank : 2 * self.rank + 2]

    def _barrier(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        self.communicator.barrier()
        yield from ()

    def _all_to_all(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, rows in self._splits():
            got = self.communicator.all_to_all(self._array(self._sent(rows, self.rank)), *self._own(rows))
            yield f"all_to_all ({name})", self._numpy(got), self._received(rows, self.rank)

    def _all_to_all_gradient(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, rows in self._splits():
            send, receive = self._own(rows)
            # The gradient of sum(exchange(x) * w) is the exchange of w with the splits swapped.
            weight = self._array(self._sent(rows.T, self.rank))

            def loss(
                params: dict[str, Array],
                send: Sequence[int] = send,
                receive: Sequence[int] = receive,
                weight: Array = weight,
            ) -> Array:
                return self.communicator.ops.sum(self.communicator.all_to_all(params["x"], send, receive) * weight)

            assert self.value_and_grad
            _, gradients = self.value_and_grad(loss)({"x": self._array(self._sent(rows, self.rank))})
            yield f"gradient of all_to_all ({name})", self._numpy(gradients["x"]), self._received(rows.T, self.rank)

    def _splits(self) -> Iterator[tuple[str, np.ndarray]]:
        """Rows that rank i sends to rank j."""
        i, j = np.indices((self.size, self.size))
        yield "uneven", (2 * i + j) % 4
        yield "one rank gets all", np.where(j == self.size - 1, i + 1, 0)
        yield "one rank sends all", np.where(i == 0, 2, 0)
        yield "to the next rank alone", np.where(j == (i + 1) % self.size, 3, 0)
        yield "no rows", 0 * i

    def _own(self, rows: np.ndarray) -> tuple[list[int], list[int]]:
        return rows[self.rank].tolist(), rows[:, self.rank].tolist()

    def _sent(self, rows: np.ndarray, rank: int) -> np.ndarray:
        return self._values(rank, (int(rows[rank].sum()), WIDTH))

    def _received(self, rows: np.ndarray, rank: int) -> np.ndarray:
        starts = np.cumsum(rows, axis=1) - rows
        return np.concatenate(
            [self._sent(rows, source)[starts[source, rank] :][: rows[source, rank]] for source in range(self.size)]
        )

    def _values(self, rank: int, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers that differ between ranks and positions, in a type of numpy that holds them exactly."""
        count = int(np.prod(shape))
        small = (37 * rank + 11 * np.arange(count) + 1) % max(256 // self.size, 2)
        values = small + small * FINE[self.dtype]
        return values.astype(np.int64 if self.dtype == "index" else np.float64).reshape(shape)

    def _array(self, values: np.ndarray) -> Array:
        ops = self.communicator.ops
        if self.dtype == "index":
            return ops.from_numpy(values)
        if self.dtype == "bfloat16":
            return ops.cast(ops.from_numpy(values.astype(np.float32)), "bfloat16")
        return ops.from_numpy(values.astype(self.dtype))

    def _numpy(self, x: Array) -> np.ndarray:
        return self.communicator.ops.to_numpy(x)


def _difference(communicator: Communicator, case: str, got: np.ndarray, want: np.ndarray) -> str | None:
    """Describes the first value of a result that is wrong; None if all are right."""
    among = f" of {name_ranks(communicator.ranks)}" if communicator.size > 1 else ""
    where = f"{case} on rank {communicator.ranks[communicator.rank]}{among}"
    if got.shape != want.shape:
        return f"{where} gives shape {got.shape}; expected {want.shape}"
    wrong = np.argwhere(got != want)
    if not len(wrong):
        return None
    first = tuple(int(index) for index in wrong[0])
    return (
        f"{where} gives wrong values, the first of {len(wrong)} at {first}: "
        f"expected {want[first]}, received {got[first]}"
    )


def _sent(communicator: Communicator) -> int:
    volumes = communicator.traffic.volumes.values()
    return sum(volume.intra_node_bytes + volume.inter_node_bytes for volume in volumes)
