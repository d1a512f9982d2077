"""All figures of tokenizers as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moeport.studies.compare.spread import spread
from moeport.studies.tokenizers.evaluate import FIGURES, Measured
from moeport.studies.tokenizers.table import COLUMNS, difference, explanations
from moeport.tokenizers.measures import by_length, frequency_histogram


def to_json(found: Sequence[Measured]) -> dict[str, Any]:
    """Everything that was measured, as plain values; frequencies and lengths as in `moeport.tokenizers.measures`."""
    return {
        "text_bytes": sum(found[0].bytes_F),
        "fold_bytes": list(found[0].bytes_F),
        "explanations": explanations(found),
        "tokenizers": [_one(each, found[0]) for each in found],
    }


def _one(each: Measured, first: Measured) -> dict[str, Any]:
    counts_V, lengths_V, replaced = each.counts, each.subject.lengths, each.replaced()
    return {
        "name": each.subject.name,
        "path": str(each.subject.path),
        "vocabulary": len(counts_V),
        "scaffolds": each.subject.scaffolds,
        "tokens": int(counts_V.sum()),
        "figures": {
            name: {"value": value, "folds": each.folds(name), "deviation": spread(each.folds(name)).deviation}
            for name, value in each.figures.items()
        },
        "to_first": {} if each is first else {name: _difference(each, first, name) for name in FIGURES},
        "replaced": None
        if replaced is None
        else {**asdict(replaced), "gain": replaced.gain if math.isfinite(replaced.gain) else None},
        "frequencies": frequency_histogram(counts_V).tolist(),
        "lengths": None if lengths_V is None else by_length(counts_V, lengths_V).tolist(),
    }


def _difference(each: Measured, first: Measured, figure: str) -> dict[str, Any]:
    as_ratio = next(column.as_ratio for column in COLUMNS if column.figure == figure)
    found = difference(each, first, figure, as_ratio)
    verdict = None if found.deviation is None else found.verdict
    return {**asdict(found), "verdict": verdict, "kind": "ratio - 1" if as_ratio else "difference"}
