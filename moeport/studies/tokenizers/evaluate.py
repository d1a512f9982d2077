"""Counts how often each token occurs in a text, fold by fold, and what follows from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.errors import DataError
from moeport.studies.tokenizers.pieces import Batch, Folds
from moeport.studies.tokenizers.subject import Subject
from moeport.tokenizers.measures import Replaced, entropy, redundancy, replaced


@dataclass(frozen=True)
class Measured:
    """One tokenizer on the text."""

    subject: Subject
    counts_FV: np.ndarray
    """How often each token of the vocabulary occurs in each fold, int64."""
    bytes_F: Sequence[int]
    """UTF-8 bytes of each fold."""
    plain_FV: np.ndarray | None
    """The same for `Subject.plain`, where there is one."""

    @property
    def counts(self) -> np.ndarray:
        """How often each token of the vocabulary (V,) occurs in the whole text."""
        return self.counts_FV.sum(0)

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the whole text, by their names in `FIGURES`."""
        return {name: figure(self.counts, sum(self.bytes_F)) for name, figure in FIGURES.items()}

    def folds(self, figure: str) -> list[float]:
        """A figure of each fold."""
        return [FIGURES[figure](c_V, size) for c_V, size in zip(self.counts_FV, self.bytes_F, strict=True)]

    def replaced(self, fold: int | None = None) -> Replaced | None:
        """What is in place of tokens of BPE, in the whole text or in a fold; None without scaffolds."""
        plain = self.subject.plain
        if plain is None or self.plain_FV is None:
            return None
        old_V, new_V = (c_FV.sum(0) if fold is None else c_FV[fold] for c_FV in (self.plain_FV, self.counts_FV))
        return replaced(_by_token(plain, old_V), _by_token(self.subject, new_V))


Figure = Callable[[np.ndarray, int], float]
"""From the counts of all tokens, and the bytes of the text."""
FIGURES: Mapping[str, Figure] = {
    "bytes_per_token": lambda counts_V, size: size / max(int(counts_V.sum()), 1),
    "entropy": lambda counts_V, size: entropy(counts_V),
    "redundancy": lambda counts_V, size: redundancy(counts_V),
    "unigram_bits_per_byte": lambda counts_V, size: entropy(counts_V) * int(counts_V.sum()) / size,
    "unused": lambda counts_V, size: float((counts_V == 0).mean()),
}
"""What is computed for the whole text and for each fold."""


def evaluate(subjects: Sequence[Subject], documents: Iterable[str], folds: int) -> list[Measured]:
    """Measure tokenizers on the same text, which is read once and need not fit into memory.

    Args:
        subjects: the tokenizers.
        documents: the texts.
        folds: number of parts into which the text is dealt.

    Raises:
        DataError: there is less text than folds.
    """
    dealt = Folds(folds)
    counters = {id(each): _Counter(each, folds) for one in subjects for each in (one, one.plain) if each}
    for batch in dealt.batches(documents):
        for counter in counters.values():
            counter.add(batch)
    if not all(dealt.bytes_F):
        filled = sum(map(bool, dealt.bytes_F))
        raise DataError(
            f"the text fills {filled} of {folds} folds: give more text, or fewer folds, as in --folds {max(filled, 1)}"
        )
    return [
        Measured(
            one,
            counters[id(one)].counts_FV,
            dealt.bytes_F,
            counters[id(one.plain)].counts_FV if one.plain else None,
        )
        for one in subjects
    ]


class _Counter:
    """Counts the tokens of one tokenizer."""

    def __init__(self, subject: Subject, folds: int):
        self._subject = subject
        self.counts_FV = np.zeros((folds, len(subject.ids_V)), np.int64)
        self._place = np.full(int(subject.ids_V.max()) + 1, -1)
        self._place[subject.ids_V] = np.arange(len(subject.ids_V))

    def add(self, batch: Batch) -> None:
        for fold, ids in zip(batch.folds, self._subject.encode(batch.texts), strict=True):
            self.counts_FV[fold] += np.bincount(self._place[ids], minlength=self.counts_FV.shape[1])


def _by_token(subject: Subject, counts_V: np.ndarray) -> dict[bytes, int]:
    assert subject.tokens is not None
    return dict(zip(subject.tokens, counts_V.tolist(), strict=True))
