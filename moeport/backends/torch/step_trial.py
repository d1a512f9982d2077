"""How much faster a model trains in bfloat16 than in float32: steps of both on random tokens, in turns.

Large products are three times as fast in bfloat16 on a CPU that has units for it, but casts, norms and activations are
not, and products whose sizes are new in each step wait for code that is prepared for them. A small model may so lose
what its products gain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeport.backends.base import TrainingOptions
from moeport.backends.torch.fused import FusedOps
from moeport.backends.torch.model import TorchTrainingModel
from moeport.backends.torch.ops import TorchOps
from moeport.config.training import OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.model.planned import Planned

WARM_UP, ROUNDS = 2, 5
"""Steps of each type that do not count, and that do."""
LONGEST_STEP = 0.5
"""Models whose products alone take longer for a step, in seconds, are large: their products decide."""
MOST_PARAMETERS = 2**26
"""Of models that are built for a trial."""


def is_small(planned: Planned, flops_per_second: float) -> bool:
    """Whether steps of a model can be timed in a moment, at a rate of products in float32."""
    tokens = planned.batch_size * planned.sequence_length
    seconds = tokens * planned.model.training_flops_per_token(planned.sequence_length) / flops_per_second
    count = sum(int(np.prod(spec.shape)) for spec in planned.model.parameter_specs())
    return isinstance(planned.model, DecoderLM) and seconds <= LONGEST_STEP and count <= MOST_PARAMETERS


def speedup(planned: Planned, ops: TorchOps) -> float:
    """The median time of a step in float32 over that in bfloat16.

    Args:
        planned: a small model.
        ops: operations on the device.
    """
    params = initial_parameters(planned.model.parameter_specs(), seed=0)
    subjects = {dtype: _Subject(planned, ops, dtype, params) for dtype in ("float32", "bfloat16")}
    took: dict[str, list[float]] = {dtype: [] for dtype in subjects}
    for batch in _batches(planned):
        for dtype, subject in subjects.items():
            took[dtype].append(subject.seconds(batch))
    float32, bfloat16 = (statistics.median(times[WARM_UP:]) for times in took.values())
    return float32 / bfloat16


def _batches(planned: Planned) -> Iterator[Batch]:
    """Random tokens, with which experts get other numbers of rows in each step."""
    random, size = np.random.default_rng(0), (planned.batch_size, planned.sequence_length)
    vocab_size = planned.model.embedding_specs()[0].shape[0]
    for step in range(WARM_UP + ROUNDS):
        tokens = random.integers(0, vocab_size, (size[0], size[1] + 1))
        yield Batch(tokens[:, :-1], tokens[:, 1:], planned.model.noise(*size, 0, step))


class _Subject:
    """The model in a compute type."""

    def __init__(self, planned: Planned, ops: TorchOps, dtype: str, params: dict[str, np.ndarray]):
        if isinstance(ops, FusedOps):
            ops.prepare(dtype)
        self.model = TorchTrainingModel(ops, dtype, planned.model, params, TrainingOptions(OptimizerConfig()), None)

    def seconds(self, batch: Batch) -> float:
        """How long a step takes."""
        started = time.perf_counter()
        terms: Any = self.model.accumulate(batch, 1.0)
        self.model.step(1e-3, self.model.gradient_norm())
        float(terms.loss)
        return time.perf_counter() - started
