"""The learning rate of each step."""

from __future__ import annotations

import math

from moeport.config.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimiser step `step`, counted from 0.

    Linear warm-up to the peak over `warmup_steps`, then, by name: `cosine`, a cosine down to the final fraction; `wsd`
    (warm-up, stable, decay), constant and then linear over the last `decay_fraction` of all steps; or `constant`.
    """
    schedule, peak = config.schedule, config.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "cosine":
        start, shape = schedule.warmup_steps, lambda done: (1 + math.cos(math.pi * done)) / 2
    else:
        start = max(schedule.warmup_steps, total_steps - math.ceil(schedule.decay_fraction * total_steps))
        shape = lambda done: 1 - done  # noqa: E731
    done = max(0, step - start) / max(1, total_steps - start)
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * shape(done))
