"""Validation loss, bits per byte of text, and accuracy on images."""

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
    """Mean negative log-likelihood, nats a token; of images nats an image."""
    bits_per_byte: float | None = None
    """All tokens' negative log-likelihood in bits over the documents' UTF-8 bytes; comparable across tokenizers. None
    for images.
    """
    accuracy: float | None = None
    """Share of the images whose class has the highest score; None for text."""


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


def evaluate_images(model: EvaluationModel, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Evaluation:
    """Evaluate on batches of (patch_BSP, class_B1) that cover every image once; the first of equal scores counts."""
    nats, right, images = 0.0, 0, 0
    for patch_BSP, class_B1 in batches:
        score_BC = model.logits(patch_BSP).astype(np.float64)
        top_B1 = score_BC.max(axis=1, keepdims=True)
        log_partition_B1 = top_B1 + np.log(np.exp(score_BC - top_B1).sum(axis=1, keepdims=True))
        nats += float((log_partition_B1 - np.take_along_axis(score_BC, class_B1, axis=1)).sum())
        right += int((score_BC.argmax(axis=1) == class_B1[:, 0]).sum())
        images += len(class_B1)
    return Evaluation(nats / images, accuracy=right / images)
