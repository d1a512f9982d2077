"""Tokenizers side by side, as tables for the terminal, for Markdown and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeport.pages.tables import Table
from moeport.studies.compare.spread import CONFIDENCE, Paired, paired, spread
from moeport.studies.tokenizers.evaluate import Measured

REPLACED = "tokens replaced"


@dataclass(frozen=True)
class Column:
    """A figure of the text."""

    title: str
    figure: str
    """A name in `evaluate.FIGURES`."""
    show: Callable[[float], str]
    as_ratio: bool
    """Whether it is compared with the first tokenizer's by their ratio, or else by their difference."""
    show_difference: Callable[[float], str] = "{:+.4f}".format


COLUMNS = (
    Column("bytes per token", "bytes_per_token", "{:.4f}".format, True),
    Column("entropy H, bits", "entropy", "{:.4f}".format, False),
    Column("redundancy R", "redundancy", "{:.4f}".format, False),
    Column("H per byte, bits", "unigram_bits_per_byte", "{:.4f}".format, True),
    Column("unused tokens", "unused", "{:.2%}".format, False, lambda share: f"{100 * share:+.2f} pp"),
)


def tables(found: Sequence[Measured]) -> list[Table]:
    """The figures of the text, the same against the first tokenizer, and the vocabularies."""
    return [_figures(found), *([_differences(found)] if len(found) > 1 else []), _vocabularies(found)]


def markdown(found: Sequence[Measured]) -> str:
    """The tables and what they mean, as Markdown."""
    parts = []
    for table in tables(found):
        lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
        rows = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
        parts.append(f"**{table.title}**\n\n{rows}\n")
    return "\n".join([*parts, *(f"{line}\n" for line in explanations(found))])


def explanations(found: Sequence[Measured]) -> list[str]:
    """Explains the tables, in a sentence or two each."""
    folds = len(found[0].bytes_F)
    total = sum(found[0].bytes_F)
    lines = [
        f"{total / 1e6:.2f} MB of text in {folds} folds of equal size. Figures are those of the whole text, ± the "
        "standard deviation over the folds; a fold has less text, and so a lower H.",
        "H = -Σ p log2 p over the tokens of the text, R = 1 - H / log2 |V| with |V| the size of the vocabulary without "
        "special tokens. H per byte is H divided by the bytes per token: the bits per byte of a model that knows the "
        "frequency of each token and no more.",
    ]
    if len(found) > 1:
        lines.append(
            f"Differences are those of the folds, in brackets with their {CONFIDENCE:.0%} interval of Student's t; ~ "
            "marks those that the folds do not resolve. Folds are parts of one text: other training text may give "
            "other differences."
        )
    if any(each.subject.plain for each in found):
        lines.append(
            "Tokens replaced: those that BPE of the same size, from the same training, has and Scaffold-BPE has not, "
            "as a share of the vocabulary; as many are in their place. Gain: by how much the mean frequency of the new "
            "ones, in the text as Scaffold-BPE encodes it, is above that of those replaced, as that BPE encodes it. "
            "Scaffolds: all tokens that Scaffold-BPE trained and hides, as a share of the vocabulary."
        )
    return lines


def _figures(found: Sequence[Measured]) -> Table:
    rows = []
    for each in found:
        cells = [
            with_deviation(each.figures[column.figure], each.folds(column.figure), column.show) for column in COLUMNS
        ]
        rows.append([each.subject.name, f"{each.counts.sum():,}", *cells])
    return Table("On the text", ["tokenizer", "tokens", *(column.title for column in COLUMNS)], rows)


def difference(each: Measured, first: Measured, figure: str, as_ratio: bool) -> Paired:
    """A figure's ratio less 1, or its difference, to that of another tokenizer, paired by fold."""
    pairs = zip(each.folds(figure), first.folds(figure), strict=True)
    return paired([(own / other - 1 if other else math.nan) if as_ratio else own - other for own, other in pairs])


def _differences(found: Sequence[Measured]) -> Table:
    first, *others = found
    rows = [
        [
            each.subject.name,
            *(_difference(difference(each, first, column.figure, column.as_ratio), column) for column in COLUMNS),
        ]
        for each in others
    ]
    return Table(f"Against {first.subject.name}", ["tokenizer", *(column.title for column in COLUMNS)], rows)


def _difference(value: Paired, column: Column) -> str:
    show: Callable[[float], str] = "{:+.2%}".format if column.as_ratio else column.show_difference
    if value.low is None or value.high is None:
        return show(value.mean)
    mark = "~" if value.verdict == "not resolved" else ""
    return f"{mark}{show(value.mean)} [{show(value.low)}, {show(value.high)}]"


def _vocabularies(found: Sequence[Measured]) -> Table:
    rows = []
    for each in found:
        size, replaced = each.counts_FV.shape[1], each.replaced()
        cells = ["-"] * 5
        if replaced is not None:
            of_folds = [part.gain for fold in range(len(each.bytes_F)) if (part := each.replaced(fold))]
            cells = [
                f"{each.subject.scaffolds:,} ({each.subject.scaffolds / size:.2%})",
                f"{replaced.number:,} ({replaced.number / size:.2%})",
                f"{replaced.frequency:,.1f}",
                f"{replaced.new_frequency:,.1f}",
                with_deviation(replaced.gain, of_folds, "{:+.1%}".format),
            ]
        lengths = each.subject.lengths
        mean = "-" if lengths is None else f"{lengths.mean():.2f}"
        rows.append([each.subject.name, f"{size:,}", mean, *cells])
    header = ["tokenizer", "size", "mean length, bytes", "scaffolds", REPLACED]
    return Table("Vocabulary", [*header, "their frequency", "of those in their place", "gain"], rows)


def with_deviation(whole: float, folds: Sequence[float], show: Callable[[float], str]) -> str:
    """A value with the standard deviation over the folds, if there are several and each has a value."""
    deviation = spread(folds).deviation if all(map(math.isfinite, folds)) else None
    return show(whole) if deviation is None else f"{show(whole)} ± {show(deviation).removeprefix('+')}"
