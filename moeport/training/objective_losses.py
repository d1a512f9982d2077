"""The training loss of each denoiser of a mixture. K denoisers; shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.comm.communicator import Communicator
from moeport.core.array import Array


@dataclass(frozen=True)
class SequenceNats:
    """The losses of the sequences of one micro-batch."""

    nats: Array
    """Weighted cross entropy of each sequence, summed over its targets, (passes, B) on the device."""
    weight_B: np.ndarray
    """Sum of the weights of its targets."""
    number_B: np.ndarray
    """Number of its denoiser."""


def losses_by_denoiser(
    world: Communicator, names: Sequence[str], steps: Sequence[Sequence[SequenceNats]]
) -> list[dict[str, float] | None]:
    """For each step the mean cross entropy of each denoiser in nats per target, over all micro-batches and ranks.

    Args:
        world: the ranks, all of which call this function.
        names: of the denoisers.
        steps: for each step the losses of this rank's micro-batches; none: it has no mixture.

    Returns: by name, without denoisers that no sequence of the step was drawn for; None without a mixture.
    """
    if not any(steps):
        return [None for _ in steps]
    host = iter(world.ops.fetch([part.nats for parts in steps for part in parts]))
    total_NK2 = np.zeros((len(steps), len(names), 2))
    for total_K2, parts in zip(total_NK2, steps, strict=True):
        for part in parts:
            nats_PB = next(host).astype(np.float64)
            np.add.at(total_K2[:, 0], part.number_B, nats_PB.mean(0))
            np.add.at(total_K2[:, 1], part.number_B, part.weight_B)
    total_NK2 = world.sum_of_numbers(total_NK2.reshape(-1)).reshape(total_NK2.shape)
    return [
        {name: round(nats / weight, 6) for name, (nats, weight) in zip(names, total_K2.tolist(), strict=True) if weight}
        if parts
        else None
        for total_K2, parts in zip(total_NK2, steps, strict=True)
    ]
