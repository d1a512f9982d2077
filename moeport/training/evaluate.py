"""Validation loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moeport.backends.base import Backend, EvaluationModel
from moeport.core.model import Batch


@dataclass(frozen=True)
class Evaluation:
    """The result on a whole validation set."""

    loss: float
    """Mean negative log-likelihood, nats a token."""
    bits_per_byte: float
    """All tokens' negative log-likelihood in bits over the documents' UTF-8 bytes; comparable across tokenizers."""


def evaluate(
    backend: Backend, model: EvaluationModel, batches: Iterable[tuple[np.ndarray, np.ndarray]], num_bytes: int
) -> Evaluation:
    """Evaluate on batches of (tokens_BS, targets_BS) that cover every token once."""
    nats, tokens = 0.0, 0
    for token_BS, target_BS in batches:
        terms = model.evaluate(Batch(token_BS, target_BS))
        nats += float(backend.ops.to_numpy(terms.cross_entropy)) * target_BS.size
        tokens += target_BS.size
    return Evaluation(nats / tokens, nats / math.log(2) / num_bytes)
