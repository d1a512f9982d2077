"""Long-context figures of several models as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from moeport.pages.tables import Table
from moeport.studies.compare.spread import Paired
from moeport.studies.long_context.measure import LongContext
from moeport.studies.long_context.needles import FORMS, Options

SHOWN = {"exact": "exact", "recall": "recalled", "choice": "chosen", "tokens": "tokens right"}
"""Titles of the shares."""
ROWS = 8
"""Ranges of positions in the table; the page and the JSON have every block."""


def tables(found: Sequence[LongContext], options: Options) -> list[Table]:
    """Needles by form and length, and the loss by position."""
    shown = []
    if found[0].cells:
        shown.append(_needles(found, options))
    if found[0].positions:
        shown.append(_positions(found))
    return shown


def explanations(found: Sequence[LongContext], options: Options) -> list[str]:
    """How to read the tables, a sentence each."""
    said = []
    if found[0].cells:
        said += [
            "exact: the most likely tokens, one after the other, are the answer. recalled: share of the wanted values "
            "among them, in any order (RULER). chosen: the answer is more likely than each of the other candidates; "
            f"{options.chance:.0%} by chance. tokens right: the answer's tokens that are the most likely ones after "
            "those before them. nats: of the answer, per token. Lengths are in tokens, with the answer.",
            *(f"{name}: {FORMS[name].summary}" for name in options.forms),
        ]
    if found[0].positions:
        said.append(
            "Loss by position: mean over sequences in nats per token, and its 95% interval (Student's t). "
            + " ".join(_sizes(found))
        )
    return said


def _sizes(found: Sequence[LongContext]) -> list[str]:
    """How many sequences from how many documents, model by model where their tokenizers make that differ."""
    measured = {each.name: each.positions for each in found if each.positions}
    sizes = {name: f"{len(each.nats_NP):,}; documents: {each.documents:,}." for name, each in measured.items()}
    if len({*sizes.values()}) == 1:
        return [f"Sequences: {next(iter(sizes.values()))}"]
    return [f"Sequences of {name}: {size}" for name, size in sizes.items()]


def _needles(found: Sequence[LongContext], options: Options) -> Table:
    header = ["model", "form", "length", "trained on", "questions", *SHOWN.values(), "nats"]
    rows = []
    for form in options.forms:
        for length in options.lengths:
            for each in found:
                cell = each.total(form, length)
                shares = [f"{getattr(cell, share):.1%}" for share in SHOWN]
                start = [each.name, form, f"{length:,}", f"{each.trained_length:,}", f"{cell.questions:,}"]
                rows.append([*start, *shares, f"{cell.nats:.3f}"])
    return Table("Needles in a haystack", header, rows)


def _positions(found: Sequence[LongContext]) -> Table:
    measured = [each.positions for each in found if each.positions]
    blocks = measured[0].blocks
    step = max(1, -(-len(blocks) // ROWS))
    rows = []
    for start in range(0, len(blocks), step):
        first, last = blocks[start][0], blocks[min(start + step, len(blocks)) - 1][1]
        means = [each.over(first, last) for each in measured]
        rows.append([f"{first:,} to {last:,}", *map(shown, means)])
    return Table("Loss by position", ["positions", *(each.name for each in found)], rows)


def shown(found: Paired) -> str:
    """A mean with its interval."""
    if found.low is None or found.high is None:
        return f"{found.mean:.4f}"
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"
