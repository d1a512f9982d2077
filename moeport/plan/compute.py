"""What ranks compute in a step, and how fast they do it, fitted to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.plan.fit import non_negative_least_squares


@dataclass(frozen=True)
class Work:
    """Work of one rank in a step, or of all ranks that share its processor."""

    flops: float
    """Forward and backward."""
    parameters: float
    """Parameters that it updates."""
    blocks: float
    """Blocks that it starts; each costs its operations' overhead, whatever their size."""


@dataclass(frozen=True)
class Speed:
    """Seconds per unit of work."""

    flop: float
    parameter: float = 0.0
    block: float = 0.0

    def seconds(self, work: Work) -> float:
        """One after the other."""
        return self.flop * work.flops + self.parameter * work.parameters + self.block * work.blocks


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step."""

    work: Work
    communication: float
    """Seconds of it that are predicted for exchanges and gradients."""
    seconds: float


@dataclass(frozen=True)
class SpeedFit:
    """A speed, and how far its steps are from the measured ones."""

    speed: Speed
    errors: np.ndarray
    """Per step: fitted over measured time, less 1."""


def fit_speed(steps: Sequence[MeasuredStep]) -> SpeedFit:
    """The speed with the least sum of squared relative errors of whole steps; no part of it is negative.

    Where steps do not tell the three apart, such as one step alone, floating-point operations count rather than
    parameters, and these rather than blocks.
    """
    seconds_S = np.array([step.seconds for step in steps])
    communication_S = np.array([step.communication for step in steps])
    terms_S3 = np.array([(step.work.blocks, step.work.parameters, step.work.flops) for step in steps])
    wanted_S = 1 - communication_S / seconds_S
    block, parameter, flop = map(float, non_negative_least_squares(terms_S3 / seconds_S[:, None], wanted_S))
    speed = Speed(flop, parameter, block)
    found_S = communication_S + np.array([speed.seconds(step.work) for step in steps])
    return SpeedFit(speed, found_S / seconds_S - 1)
