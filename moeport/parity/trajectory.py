"""Compares the steps of two trajectories: losses, gradient norms and learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moeport.parity import thresholds
from moeport.parity.recording import Step
from moeport.parity.result import StepResult, Verdict
from moeport.parity.thresholds import Limits

SAME_RATE = 1e-9
"""Largest relative difference of learning rates, which are computed on the host."""


def compare_steps(a: Sequence[Step], b: Sequence[Step], limits: Limits, parted: bool = False) -> list[StepResult]:
    """Compare the steps that both have.

    Args:
        a: those of the reference.
        b: those of the other.
        limits: for losses and gradient norms.
        parted: whether the sides chose differently in the recorded pass. Otherwise the loads say so.
    """
    found = []
    for s, t in zip(a, b, strict=False):
        parted = parted or s.expert_load != t.expert_load
        found.append(_step(s, t, limits, parted))
    return found


def _step(s: Step, t: Step, limits: Limits, parted: bool) -> StepResult:
    """Compare a step; where routing has parted, losses and gradient norms may differ by more."""
    verdict, reason = _judged(s, t, limits, parted)
    loads = np.abs(np.subtract(s.expert_load, t.expert_load)) if s.expert_load else np.zeros(1)
    return StepResult(
        step=s.step,
        loss_a=s.loss,
        loss_b=t.loss,
        difference=_relative(s.loss, t.loss),
        limit=_loss_limit(limits, parted),
        verdict=verdict,
        grad_norm_a=s.grad_norm,
        grad_norm_b=t.grad_norm,
        load_difference=float(loads.max(initial=0.0)),
        lr_a=s.lr,
        lr_b=t.lr,
        reason=reason,
    )


def _judged(s: Step, t: Step, limits: Limits, parted: bool) -> tuple[Verdict, str]:
    norm = max(limits.norm, thresholds.OTHER_ROUTING) if parted else limits.norm
    quantities = (
        ("learning rate", s.lr, t.lr, SAME_RATE),
        ("loss", s.loss, t.loss, _loss_limit(limits, parted)),
        ("total loss", s.total_loss, t.total_loss, _loss_limit(limits, parted)),
        ("gradient norm", s.grad_norm, t.grad_norm, norm),
    )
    for name, x, y, limit in quantities:
        if not (math.isfinite(x) or math.isfinite(y)):
            return "warn", f"the {name} is not finite on both sides"
        if not _relative(x, y) <= limit:
            return "fail", f"the {name} exceeds its tolerance at step {s.step} ({x:.6g} and {y:.6g})"
    return "pass", ""


def _loss_limit(limits: Limits, parted: bool) -> float:
    return max(limits.trajectory, thresholds.OTHER_LOSS) if parted else limits.trajectory


def _relative(x: float, y: float) -> float:
    """|y - x| / |x|, and |y| if x is 0; infinite if only one of the two is finite."""
    if math.isfinite(x) != math.isfinite(y):
        return math.inf
    return abs(y - x) / abs(x) if x else abs(y)
