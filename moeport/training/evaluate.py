"""Validation loss, bits per byte of text, and accuracy on images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np

from moeport.backends.base import EvaluationModel
from moeport.comm.communicator import Communicator
from moeport.data.document_starts import document_starts
from moeport.model.batch import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Results on the whole validation set."""

    loss: float
    """Mean negative log-likelihood in nats per token, or per image."""
    bits_per_byte: float | None = None
    """Total negative log-likelihood in bits, divided by the UTF-8 bytes of the documents: comparable across tokenizers.
    None for images.
    """
    accuracy: float | None = None
    """Share of the images whose class has the highest score; None for text."""
    loss_by_domain: dict[str, float] | None = None
    """The loss on the text of each domain; None without domains."""


Window = tuple[np.ndarray, np.ndarray]
"""Tokens and targets (B, S), or patches and classes."""


def evaluate(
    world: Communicator,
    model: EvaluationModel,
    batches: Iterable[Window],
    num_bytes: int,
    first_token: int | None = None,
) -> Evaluation:
    """Evaluate on batches of (tokens_BS, targets_BS) that together cover every token once; the ranks share them.

    Attention stays within documents that begin at `first_token`; None: it crosses them.
    """
    total_2 = _totals(world, model, ((0, window) for window in batches), 1, first_token, has_domains=False).sum(0)
    return _of_text(total_2, num_bytes)


def evaluate_domains(
    world: Communicator,
    model: EvaluationModel,
    batches: Iterable[tuple[int, Window]],
    names: Sequence[str],
    num_bytes: int,
    first_token: int | None = None,
) -> Evaluation:
    """`evaluate` on batches that are each of one domain, given by its number; also returns the loss of each domain."""
    total_D2 = _totals(world, model, batches, len(names), first_token, has_domains=True)
    by_domain = {name: float(nats / tokens) for name, (nats, tokens) in zip(names, total_D2, strict=True)}
    return replace(_of_text(total_D2.sum(0), num_bytes), loss_by_domain=by_domain)


def _totals(
    world: Communicator,
    model: EvaluationModel,
    batches: Iterable[tuple[int, Window]],
    domains: int,
    first_token: int | None,
    has_domains: bool,
) -> np.ndarray:
    """Nats and targets of each domain (D, 2), over all ranks."""
    total_D2 = np.zeros((domains, 2))
    for (domain, (token_BS, target_BS)), counts in _share_of_rank(batches, world):
        domain_B = np.full(len(token_BS), domain) if has_domains else None
        batch = Batch(token_BS, target_BS, {}, document_starts(token_BS, first_token), domain_B)
        cross_entropy = float(world.ops.to_numpy(model.evaluate(batch).cross_entropy))
        if counts:
            total_D2[domain] += cross_entropy * target_BS.size, target_BS.size
    return world.sum_of_numbers(total_D2.reshape(-1)).reshape(total_D2.shape)


def losses_by_frequency(
    world: Communicator,
    model: EvaluationModel,
    batches: Iterable[tuple[int, Window]],
    frequent_V: np.ndarray,
    first_token: int | None = None,
    has_domains: bool = False,
) -> dict[str, float]:
    """The loss on targets that are rare and on those that are frequent ids; the ranks share the batches.

    Args:
        world: all ranks.
        model: the model.
        batches: as of `evaluate_domains`; without domains their numbers do not matter.
        frequent_V: whether each id is frequent.
        first_token: as of `evaluate`.
        has_domains: whether the batches are of domains.

    Returns: nats per target for `rare` and `frequent`, without a kind that does not occur.
    """
    total_22 = np.zeros((2, 2))
    for (domain, (token_BS, target_BS)), counts in _share_of_rank(batches, world):
        domain_B = np.full(len(token_BS), domain) if has_domains else None
        nats_BS = model.token_losses(Batch(token_BS, target_BS, {}, document_starts(token_BS, first_token), domain_B))
        if counts:
            is_frequent_BS = frequent_V[target_BS]
            for kind, chosen_BS in enumerate((~is_frequent_BS, is_frequent_BS)):
                total_22[kind] += nats_BS[chosen_BS].sum(dtype=np.float64), chosen_BS.sum()
    total_22 = world.sum_of_numbers(total_22.reshape(-1)).reshape(2, 2)
    names = ("rare", "frequent")
    return {name: float(nats / targets) for name, (nats, targets) in zip(names, total_22, strict=True) if targets}


def _of_text(total_2: np.ndarray, num_bytes: int) -> Evaluation:
    nats, tokens = total_2.tolist()
    return Evaluation(nats / tokens, nats / math.log(2) / num_bytes)


def evaluate_images(world: Communicator, model: EvaluationModel, batches: Iterable[Window]) -> Evaluation:
    """Evaluate on batches of (patch_BSP, class_B1) that together cover every image once; the ranks share them.

    Of equal scores, the first counts.
    """
    nats = right = images = 0.0
    for (patch_BSP, class_B1), counts in _share_of_rank(batches, world):
        score_BC = model.logits(patch_BSP).astype(np.float64)
        top_B1 = score_BC.max(axis=1, keepdims=True)
        log_partition_B1 = top_B1 + np.log(np.exp(score_BC - top_B1).sum(axis=1, keepdims=True))
        if counts:
            nats += float((log_partition_B1 - np.take_along_axis(score_BC, class_B1, axis=1)).sum())
            right += int((score_BC.argmax(axis=1) == class_B1[:, 0]).sum())
            images += len(class_B1)
    nats, right, images = world.sum_of_numbers(np.array([nats, right, images])).tolist()
    return Evaluation(nats / images, accuracy=right / images)


def _share_of_rank(batches: Iterable[T], world: Communicator) -> Iterator[tuple[T, bool]]:
    """Every `world.size`-th batch, and whether it counts.

    Every rank gets the same number of batches, since the model may exchange tokens between ranks: a rank without a
    batch of its own in the last round runs another rank's and discards the result.
    """
    remaining = iter(batches)
    while found := list(islice(remaining, world.size)):
        has_one = world.rank < len(found)
        yield found[world.rank if has_one else 0], has_one
