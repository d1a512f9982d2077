"""The learning rate of each step."""

from __future__ import annotations

import math

from moeport.config.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimiser step `step`, counted from 0.

    Linear warm-up to the peak over `warmup_steps`, then, by name: `cosine`, a cosine down to the final fraction; `wsd`
    (warm-up, stable, decay), constant and then linear over the last `decay_fraction` of all steps; `inverse_sqrt`, in
    proportion to 1 / sqrt(step); or `constant`. If the schedule has a length of its own, it counts instead of
    `total_steps`, and the rate stays where it ends.
    """
    schedule, peak = config.schedule, config.learning_rate
    total_steps = schedule.steps or total_steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(1, schedule.warmup_steps) / (step + 1))
    if schedule.name == "cosine":
        start, shape = schedule.warmup_steps, lambda done: (1 + math.cos(math.pi * done)) / 2
    else:
        start = decay_start(config, total_steps)
        shape = lambda done: 1 - done  # noqa: E731
    done = min(1.0, max(0, step - start) / max(1, total_steps - start))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * shape(done))


def decay_start(config: OptimizerConfig, total_steps: int) -> int:
    """The number of steps before the decay of a `wsd` schedule."""
    total_steps = config.schedule.steps or total_steps
    return max(config.schedule.warmup_steps, total_steps - math.ceil(config.schedule.decay_fraction * total_steps))
