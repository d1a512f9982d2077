"""Times of an operation over ranks and repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

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
        """Elements of its results that are not what they should be."""


@dataclass(frozen=True)
class Taken:
    """What an operation took; times in microseconds, over repetitions."""

    time_us: float
    """Median of the time of the slowest rank."""
    low_us: float
    """Lower quartile of the slowest rank's time."""
    high_us: float
    """Upper quartile."""
    fastest_us: float
    """Median of the fastest rank."""
    exchange_us: float
    """Median of the mean over ranks of the time spent in all-to-alls, waiting for others included."""
    intra_node_bytes: int
    """Sent by all ranks in one repetition to others of their node."""
    inter_node_bytes: int
    """Sent by all ranks in one repetition to other nodes."""
    wrong: int | None
    """Elements with wrong values over all ranks; None: not checked."""


def measure(
    operations: Sequence[Runnable],
    communicators: Sequence[Communicator],
    ops: Ops,
    *,
    warmup: int,
    repetitions: int,
    check: bool,
) -> list[Taken]:
    """Run operations in turn, so that what disturbs the machine disturbs all alike. Every rank calls it.

    Args:
        operations: what to run.
        communicators: all that carry data of them; the first is that of all ranks.
        ops: the backend's operations.
        warmup: untimed runs of each.
        repetitions: timed runs of each.
        check: compare the values of the last run.
    """
    world = communicators[0]
    seconds = np.zeros((len(operations), repetitions))
    sent = np.zeros((len(operations), repetitions, 3))
    results = []
    for operation in operations:
        for _ in range(warmup):
            _finish(ops, operation.run())
    for repetition in range(repetitions):
        for number, operation in enumerate(operations):
            world.barrier()
            before = _sent(communicators)
            started = time.perf_counter()
            result = operation.run()
            _finish(ops, result)
            seconds[number, repetition] = time.perf_counter() - started
            sent[number, repetition] = _sent(communicators) - before
            if repetition == repetitions - 1:
                results.append(operation.wrong(result) if check else 0)
    everyone = _gathered(world, ops, seconds) * 1e6
    volume = _gathered(world, ops, sent)
    wrong = _gathered(world, ops, np.array(results)).sum(0)
    found = []
    for number in range(len(operations)):
        slowest, fastest = everyone[:, number].max(0), everyone[:, number].min(0)
        low, median, high = (float(value) for value in np.quantile(slowest, (0.25, 0.5, 0.75)))
        intra, inter, _ = volume[:, number, -1].sum(0)
        found.append(
            Taken(
                time_us=median,
                low_us=low,
                high_us=high,
                fastest_us=float(np.median(fastest)),
                exchange_us=float(np.median(volume[:, number, :, 2].mean(0))) * 1e6,
                intra_node_bytes=int(intra),
                inter_node_bytes=int(inter),
                wrong=int(wrong[number]) if check else None,
            )
        )
    return found


def _finish(ops: Ops, result: Array | Mapping[str, Array]) -> None:
    """Wait for the device: an accelerator returns before it is done."""
    for array in result.values() if isinstance(result, Mapping) else [result]:
        ops.to_numpy(ops.reshape(array, (-1,))[:1])


def _sent(communicators: Sequence[Communicator]) -> np.ndarray:
    """Bytes inside the node and to others, and seconds in all-to-alls, of this rank so far."""
    volumes = [volume for each in communicators for volume in each.traffic.snapshot().values()]
    return np.array([(v.intra_node_bytes, v.inter_node_bytes, v.seconds) for v in volumes] or [(0, 0, 0.0)]).sum(0)


def _gathered(world: Communicator, ops: Ops, values: np.ndarray) -> np.ndarray:
    """The arrays of all ranks, (size, ...), float64."""
    return ops.to_numpy(world.all_gather(ops.from_numpy(values.astype(np.float64))))
