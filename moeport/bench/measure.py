"""Times operations over ranks and repetitions.

Shape suffixes: R ranks, N operations, P repetitions, V counters of a communicator (bytes within the node, bytes
to other nodes, seconds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moeport.bench.options import Runs
from moeport.comm.communicator import Communicator
from moeport.core.array import Array
from moeport.core.ops import Ops


class Runnable(Protocol):
    """An operation that is ready to run."""

    @property
    def run(self) -> Callable[[], Array | Mapping[str, Array]]:
        """Run it once; returns its results."""

    @property
    def wrong(self) -> Callable[[Any], int]:
        """Counts the wrong elements of its results."""


@dataclass(frozen=True)
class Timing:
    """Time and traffic of an operation; times in microseconds over repetitions."""

    time_us: float
    """Median of the time of the slowest rank."""
    low_us: float
    """Lower quartile of the slowest rank's time."""
    high_us: float
    """Upper quartile."""
    fastest_us: float
    """Median of the fastest rank."""
    exchange_us: float
    """Median of the mean over ranks of the time spent in all-to-alls, including waiting for others."""
    intra_node_bytes: int
    """Sent by all ranks in one repetition within their nodes."""
    inter_node_bytes: int
    """Sent by all ranks in one repetition to other nodes."""
    wrong: int | None
    """Elements with wrong values over all ranks; None: not checked."""


def measure(
    operations: Sequence[Runnable],
    communicators: Sequence[Communicator],
    ops: Ops,
    runs: Runs,
) -> list[Timing]:
    """Run operations in turn, so that disturbances of the machine affect all of them alike. Every rank must call it.

    Args:
        operations: what to run.
        communicators: all that carry their data; the first is that of all ranks.
        ops: the backend's operations.
        runs: how often each runs, and whether values are checked.
    """
    seconds, sent, results = _timed(operations, communicators, ops, runs)
    world = communicators[0]
    us_RNP = _gather(world, ops, seconds) * 1e6
    volume_RNPV = _gather(world, ops, sent)
    wrong_N = _gather(world, ops, results).sum(0)
    return [
        _timing(us_RNP[:, i], volume_RNPV[:, i], int(wrong_N[i]) if runs.check else None)
        for i in range(len(operations))
    ]


def _timed(
    operations: Sequence[Runnable], communicators: Sequence[Communicator], ops: Ops, runs: Runs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds (N, P), what `_sent` counted (N, P, 3) and wrong values (N,) of this rank's operations."""
    world = communicators[0]
    seconds_NP = np.zeros((len(operations), runs.repetitions))
    sent_NPV = np.zeros((len(operations), runs.repetitions, 3))
    wrong = []
    for operation in operations:
        for _ in range(runs.warmup):
            _finish(ops, operation.run())
    for repetition in range(runs.repetitions):
        for number, operation in enumerate(operations):
            world.barrier()
            before = _sent(communicators)
            started = time.perf_counter()
            result = operation.run()
            _finish(ops, result)
            seconds_NP[number, repetition] = time.perf_counter() - started
            sent_NPV[number, repetition] = _sent(communicators) - before
            if repetition == runs.repetitions - 1:
                wrong.append(operation.wrong(result) if runs.check else 0)
    return seconds_NP, sent_NPV, np.array(wrong)


def _timing(us_RP: np.ndarray, volume_RPV: np.ndarray, wrong: int | None) -> Timing:
    """Time and traffic of one operation, from the measurements of all ranks."""
    slowest, fastest = us_RP.max(0), us_RP.min(0)
    low, median, high = (float(value) for value in np.quantile(slowest, (0.25, 0.5, 0.75)))
    intra, inter, _ = volume_RPV[:, -1].sum(0)
    return Timing(
        time_us=median,
        low_us=low,
        high_us=high,
        fastest_us=float(np.median(fastest)),
        exchange_us=float(np.median(volume_RPV[:, :, 2].mean(0))) * 1e6,
        intra_node_bytes=int(intra),
        inter_node_bytes=int(inter),
        wrong=wrong,
    )


def _finish(ops: Ops, result: Array | Mapping[str, Array]) -> None:
    """Wait for the device: on an accelerator, calls return before the work is done."""
    for array in result.values() if isinstance(result, Mapping) else [result]:
        ops.to_numpy(ops.reshape(array, (-1,))[:1])


def _sent(communicators: Sequence[Communicator]) -> np.ndarray:
    """Bytes sent within the node and to other nodes, and seconds in all-to-alls, on this rank so far."""
    volumes = [volume for each in communicators for volume in each.traffic.snapshot().values()]
    return np.array([(v.intra_node_bytes, v.inter_node_bytes, v.seconds) for v in volumes] or [(0, 0, 0.0)]).sum(0)


def _gather(world: Communicator, ops: Ops, values: np.ndarray) -> np.ndarray:
    """The arrays of all ranks, (size, ...), float64."""
    return ops.to_numpy(world.all_gather(ops.from_numpy(values.astype(np.float64))))
