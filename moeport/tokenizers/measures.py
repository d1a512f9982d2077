"""Measures of a tokenizer, from how often each token of its vocabulary occurs in a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LONGEST = 16
"""Longer tokens are counted with those of this many bytes."""


@dataclass(frozen=True)
class Replaced:
    """What Scaffold-BPE puts in place of the tokens that it takes out of the vocabulary of BPE of the same size."""

    number: int
    """Tokens of BPE's vocabulary that are not in that of Scaffold-BPE; as many are in its place."""
    frequency: float
    """Mean frequency of the tokens taken out, in the text as BPE encodes it."""
    new_frequency: float
    """Mean frequency of those in their place, in the text as Scaffold-BPE encodes it."""

    @property
    def gain(self) -> float:
        """By how much the mean frequency grows, as a fraction of that of the tokens taken out; NaN if it is 0."""
        return self.new_frequency / self.frequency - 1 if self.frequency else math.nan


def entropy(counts_V: np.ndarray) -> float:
    """H = -sum p log2 p, in bits per token (Scaffold-BPE, 2404.17808); p is the relative frequency of a token.

    Args:
        counts_V: how often each token of the vocabulary occurs; integers.
    """
    found = counts_V[counts_V > 0] / max(counts_V.sum(), 1)
    return float(-(found * np.log2(found)).sum()) + 0.0


def redundancy(counts_V: np.ndarray) -> float:
    """R = 1 - H / log2 |V| (Scaffold-BPE, 2404.17808): 0 if all tokens of the vocabulary are equally frequent.

    Args:
        counts_V: how often each token of the vocabulary occurs, with those that do not.
    """
    return 1 - entropy(counts_V) / math.log2(len(counts_V))


def frequency_histogram(counts_V: np.ndarray) -> np.ndarray:
    """How many tokens are how frequent, int64: first those that never occur; then, at i, 2^(i-1) to 2^i - 1 times."""
    return np.bincount(np.frexp(counts_V.astype(np.float64))[1])


def by_length(weights_V: np.ndarray, lengths_V: np.ndarray) -> np.ndarray:
    """The share of each length in bytes, (LONGEST,): at i that of i + 1 bytes, and last that of LONGEST or more.

    Args:
        weights_V: how often each token occurs, or ones for shares of the vocabulary.
        lengths_V: length of each token in bytes, from 1.
    """
    sums = np.bincount(np.minimum(lengths_V, LONGEST) - 1, weights_V, LONGEST)
    return sums / max(sums.sum(), 1)


def replaced(old: dict[bytes, int], new: dict[bytes, int]) -> Replaced:
    """Compare the tokens that only one of two vocabularies of equal size has.

    Args:
        old: how often each token of BPE's vocabulary occurs.
        new: how often each token of Scaffold-BPE's does, in the same text.
    """
    out = [count for token, count in old.items() if token not in new]
    into = [count for token, count in new.items() if token not in old]
    return Replaced(len(out), sum(out) / max(len(out), 1), sum(into) / max(len(into), 1))
