"""The loss by position in a text. Shape suffixes: N sequences, S positions, P blocks of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from moeport.backends.base import EvaluationModel
from moeport.data import Tokenizer
from moeport.errors import UserError
from moeport.model.batch import Batch
from moeport.studies.compare.spread import Paired, paired
from moeport.studies.long_context.text import Text

BLOCKS = 32
"""Blocks that the longest length is divided into."""


@dataclass(frozen=True)
class ByPosition:
    """The loss on sequences of one length, each cut out of a document."""

    length: int
    """S."""
    block: int
    """Positions of a block; the last may have fewer."""
    documents: int
    """Documents that the sequences are from."""
    nats_NP: np.ndarray
    """Mean negative log-likelihood of each sequence in each block."""

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last position of each block, counted from 1: the number of tokens that the model has seen."""
        return [(first + 1, min(first + self.block, self.length)) for first in range(0, self.length, self.block)]

    @property
    def losses(self) -> list[Paired]:
        """Mean over the sequences in each block, with its interval."""
        return [paired(self.nats_NP[:, block].tolist()) for block in range(self.nats_NP.shape[1])]

    def by_sequence(self, first: int, last: int) -> np.ndarray:
        """Mean loss of each sequence (N,) at positions `first` to `last`, both of which are ends of blocks."""
        inside_P = np.array([first <= low and high <= last for low, high in self.blocks])
        size_P = np.array([high - low + 1 for low, high in self.blocks]) * inside_P
        means: np.ndarray = self.nats_NP @ size_P / size_P.sum()
        return means

    def over(self, first: int, last: int) -> Paired:
        """Mean over the sequences at positions `first` to `last`, with its interval."""
        return paired(self.by_sequence(first, last).tolist())


def by_position(
    model: EvaluationModel,
    tokenizer: Tokenizer,
    text: Text,
    length: int,
    sequences: int,
    tokens_at_once: int,
    progress: Callable[[], None] = lambda: None,
) -> ByPosition:
    """Measure the loss by position.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: documents, of which only those of at least `length` tokens are used.
        length: tokens that the model sees at once.
        sequences: most sequences. They are the first `length` tokens of each document, then the next ones of each.
        tokens_at_once: most tokens that are computed together, but at least one sequence, and no more where a token's
            experts depend on other tokens of its batch.
        progress: is called after each sequence.

    Raises: UserError if no document is long enough.
    """
    found = list(islice(_sequences(tokenizer, text, length), sequences))
    if not found:
        longest = max(len(tokenizer.encode_batch([document])[0]) for document in text.documents)
        raise UserError(
            f"--lengths {length}: the longest document has {longest:,} tokens; expected one of at least {length:,}, "
            "for the loss by position: lower it, or give longer texts with --text"
        )
    together = max(1, tokens_at_once // length) if model.model.is_incremental else 1
    block, nats = -(-length // BLOCKS), []
    for first in range(0, len(found), together):
        token_NS = np.stack([ids for _, ids in found[first : first + together]])
        nats_NS = model.token_losses(Batch(token_NS[:, :-1], token_NS[:, 1:])).astype(np.float64)
        for nats_S in nats_NS:
            nats.append([float(nats_S[start : start + block].mean()) for start in range(0, length, block)])
            progress()
    _check_finite(nats)
    return ByPosition(length, block, len({document for document, _ in found}), np.array(nats))


def _sequences(tokenizer: Tokenizer, text: Text, length: int) -> Iterator[tuple[int, np.ndarray]]:
    """The number of a document and `length` + 1 ids: the first of each document, then the second of each, and so on."""
    cut = [_cut(tokenizer, document, length) for document in text.documents]
    for number in range(max(map(len, cut))):
        yield from ((document, ids[number]) for document, ids in enumerate(cut) if number < len(ids))


def _cut(tokenizer: Tokenizer, document: str, length: int) -> np.ndarray:
    """Sequences of a document that follow each other, (sequences, length + 1), of which each target counts once."""
    ids = np.concatenate([[tokenizer.end_of_text], tokenizer.encode_batch([document])[0]]).astype(np.int64)
    count = (len(ids) - 1) // length
    return ids[np.arange(count)[:, None] * length + np.arange(length + 1)]


def _check_finite(nats: Sequence[Sequence[float]]) -> None:
    if not np.isfinite(nats).all():
        raise UserError(
            "the loss by position is not finite; expected finite numbers: the model's parameters or its compute type "
            "are the reason"
        )
