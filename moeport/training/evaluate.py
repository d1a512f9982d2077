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
from moeport.data.denoising import Denoising
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
        documents = document_starts(token_BS, first_token)
        batch = Batch(token_BS, target_BS, {}, documents, _domains(domain, token_BS, has_domains))
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

    def found() -> Iterator[tuple[Batch, np.ndarray]]:
        for domain, (token_BS, target_BS) in batches:
            documents = document_starts(token_BS, first_token)
            batch = Batch(token_BS, target_BS, {}, documents, _domains(domain, token_BS, has_domains))
            yield batch, frequent_V[target_BS].astype(np.int64)

    return _by_kind(world, model, found(), ("rare", "frequent"))


def losses_by_objective(
    world: Communicator,
    model: EvaluationModel,
    batches: Iterable[tuple[int, Window]],
    denoising: Denoising,
    has_domains: bool = False,
) -> dict[str, float]:
    """The loss on the targets of each denoiser, which take the sequences in turn; the ranks share the batches.

    Args:
        world: all ranks.
        model: the model.
        batches: as of `evaluate_domains`; without domains their numbers do not matter.
        denoising: rearranges the sequences.
        has_domains: whether the batches are of domains.

    Returns: nats per target by denoiser, without those that no sequence was left for.
    """

    def found() -> Iterator[tuple[Batch, np.ndarray]]:
        for domain, (token_BS, target_BS, weight_BS), number_B in denoising.held_out(batches):
            kind_BS = np.where(weight_BS > 0, number_B[:, None], -1)
            yield Batch(token_BS, target_BS, {}, None, _domains(domain, token_BS, has_domains)), kind_BS

    return _by_kind(world, model, found(), denoising.names)


def _domains(domain: int, token_BS: np.ndarray, has_domains: bool) -> np.ndarray | None:
    return np.full(len(token_BS), domain) if has_domains else None


def _by_kind(
    world: Communicator, model: EvaluationModel, batches: Iterable[tuple[Batch, np.ndarray]], names: Sequence[str]
) -> dict[str, float]:
    """Nats per target of each kind, by name, over all ranks; without kinds that do not occur.

    Each batch has the number of the kind of each target (B, S), which is negative where a target does not count.
    """
    total_K2 = np.zeros((len(names), 2))
    for (batch, kind_BS), counts in _share_of_rank(batches, world):
        nats_BS = model.token_losses(batch)
        for kind in range(len(names)) if counts else ():
            chosen_BS = kind_BS == kind
            total_K2[kind] += nats_BS[chosen_BS].sum(dtype=np.float64), chosen_BS.sum()
    total_K2 = world.sum_of_numbers(total_K2.reshape(-1)).reshape(total_K2.shape)
    return {name: float(nats / targets) for name, (nats, targets) in zip(names, total_K2, strict=True) if targets}


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
