"""Times of an operation over ranks and repetitions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.bench.operations import Measured
from moeport.comm.communicator import Communicator
from moeport.core.ops import Ops


@dataclass(frozen=True)
class Row:
    """One line of the table; columns and units as in nccl-tests."""

    operation: str
    size: int
    """Bytes."""
    count: int
    """Elements."""
    type: str
    redop: str
    root: int
    time_us: float
    """Median over repetitions of the time of the slowest rank."""
    algbw: float
    """GB/s (1e9): size over time."""
    busbw: float
    """GB/s (1e9): algbw times the share that must cross a link."""
    wrong: int | None
    """Elements with wrong values over all ranks; None: not checked."""
    fastest_us: float
    """Median of the fastest rank."""
    low_us: float
    """Lower quartile over repetitions of the slowest rank's time."""
    high_us: float
    """Upper quartile."""
    intra_node_bytes: int
    """Sent by all ranks in one repetition to others of their node."""
    inter_node_bytes: int
    """Sent by all ranks in one repetition to other nodes."""


def measure(
    operations: Sequence[tuple[str, Measured]],
    communicators: Sequence[Communicator],
    ops: Ops,
    *,
    warmup: int,
    repetitions: int,
    check: bool,
) -> list[Row]:
    """Run operations in turn, so that what disturbs the machine disturbs all alike. Every rank calls it.

    Args:
        operations: by name.
        communicators: all that carry data of them; the first is that of all ranks.
        ops: the backend's operations.
        warmup: untimed runs of each.
        repetitions: timed runs of each.
        check: compare the values of the last run.
    """
    world = communicators[0]
    seconds = np.zeros((len(operations), repetitions))
    sent = np.zeros((len(operations), 2), np.int64)
    results = []
    for _, operation in operations:
        for _ in range(warmup):
            _finish(ops, operation.run())
    for repetition in range(repetitions):
        for number, (_, operation) in enumerate(operations):
            world.barrier()
            before = _sent(communicators)
            started = time.perf_counter()
            result = operation.run()
            _finish(ops, result)
            seconds[number, repetition] = time.perf_counter() - started
            sent[number] = _sent(communicators) - before
            if repetition == repetitions - 1:
                results.append(operation.wrong(result) if check else 0)
    everyone = _gathered(world, ops, seconds)
    volume = _gathered(world, ops, sent).sum(0)
    wrong = _gathered(world, ops, np.array(results)).sum(0)
    rows = []
    for number, (name, operation) in enumerate(operations):
        slowest, fastest = everyone[:, number].max(0), everyone[:, number].min(0)
        median = float(np.median(slowest))
        low, high = np.quantile(slowest, (0.25, 0.75))
        algbw = operation.bytes / median / 1e9
        rows.append(
            Row(
                operation=name,
                size=operation.bytes,
                count=operation.count,
                type=operation.type,
                redop=operation.redop,
                root=operation.root,
                time_us=median * 1e6,
                algbw=algbw,
                busbw=algbw * operation.bus_factor,
                wrong=int(wrong[number]) if check else None,
                fastest_us=float(np.median(fastest)) * 1e6,
                low_us=float(low) * 1e6,
                high_us=float(high) * 1e6,
                intra_node_bytes=int(volume[number, 0]),
                inter_node_bytes=int(volume[number, 1]),
            )
        )
    return rows


def _finish(ops: Ops, result: object) -> None:
    """Wait for the device: an accelerator returns before it is done."""
    ops.to_numpy(ops.reshape(result, (-1,))[:1])


def _sent(communicators: Sequence[Communicator]) -> np.ndarray:
    volumes = [volume for each in communicators for volume in each.traffic.snapshot().values()]
    return np.array(
        [sum(v.intra_node_bytes for v in volumes), sum(v.inter_node_bytes for v in volumes)], dtype=np.int64
    )


def _gathered(world: Communicator, ops: Ops, values: np.ndarray) -> np.ndarray:
    """The arrays of all ranks, (size, ...), float64."""
    return ops.to_numpy(world.all_gather(ops.from_numpy(values.astype(np.float64))))
