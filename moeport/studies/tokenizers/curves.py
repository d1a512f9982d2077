"""What is drawn of tokenizers, on the page and as an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.pages.charts import Axis, Series
from moeport.studies.tokenizers.evaluate import Measured
from moeport.tokenizers.measures import LONGEST, by_length, frequency_histogram

POINTS = 160
"""Points of the curve of all frequencies."""


@dataclass(frozen=True)
class Panel:
    """One chart."""

    over: str
    axis: Axis
    series: Callable[[Measured], Series | None]
    """The line of a tokenizer; None if it has none."""


def _histogram(found: Measured) -> Series:
    numbers = frequency_histogram(found.counts)
    labels = ["never", "once", *(f"{2 ** (i - 1):,} to {2**i - 1:,} times" for i in range(2, len(numbers)))]
    return Series(
        found.subject.name, np.arange(len(numbers), dtype=float), numbers.astype(float), labels[: len(numbers)]
    )


def _ranked(found: Measured) -> Series:
    frequencies = np.sort(found.counts)[::-1] / max(found.counts.sum(), 1) * 1e6
    seen = int((frequencies > 0).sum())
    ranks = np.unique(np.linspace(0, max(seen - 1, 0), POINTS).round().astype(int))
    labels = [f"rank {rank + 1:,}" for rank in ranks.tolist()]
    return Series(found.subject.name, ranks + 1.0, frequencies[ranks], labels)


def _text_lengths(found: Measured) -> Series | None:
    return _lengths(found, found.counts)


def _vocabulary_lengths(found: Measured) -> Series | None:
    return _lengths(found, np.ones(found.counts_FV.shape[1]))


def _lengths(found: Measured, weights_V: np.ndarray) -> Series | None:
    lengths_V = found.subject.lengths
    if lengths_V is None:
        return None
    labels = [f"{size} byte{'' if size == 1 else 's'}" for size in range(1, LONGEST)] + [f"{LONGEST} bytes or more"]
    return Series(found.subject.name, np.arange(1.0, LONGEST + 1), by_length(weights_V, lengths_V), labels)


PANELS = (
    Panel(
        "k, for 2^(k-1) to 2^k - 1 times in the text; 0: never",
        Axis("Tokens by frequency", "tokens of the vocabulary", "{:,.0f}", from_zero=True),
        _histogram,
    ),
    Panel(
        "rank",
        Axis("Frequency by rank", "per million tokens of the text", "{:,.2f}", logarithmic=True),
        _ranked,
    ),
    Panel(
        "length in bytes",
        Axis("Tokens of the text by length", "share of the text's tokens", "{:.2%}", percent=True, from_zero=True),
        _text_lengths,
    ),
    Panel(
        "length in bytes",
        Axis("Vocabulary by length", "share of the vocabulary", "{:.2%}", percent=True, from_zero=True),
        _vocabulary_lengths,
    ),
)


def drawn(panel: Panel, found: Sequence[Measured]) -> list[Series]:
    """The lines of a chart."""
    return [series for each in found if (series := panel.series(each))]
