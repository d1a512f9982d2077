"""A model asked for needles, and its loss by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy.special import ndtri

from moeport.backends.base import EvaluationModel
from moeport.data import Tokenizer
from moeport.errors import UserError
from moeport.studies.compare.spread import CONFIDENCE, Paired
from moeport.studies.long_context.needles import FORMS, Options, Question, questions
from moeport.studies.long_context.positions import ByPosition, by_position
from moeport.studies.long_context.scores import Score, scores
from moeport.studies.long_context.text import Haystack, Text
from moeport.training.trained import TrainedText

Progress = Callable[[int, int], None]
"""Is told how many questions and sequences are done, and of how many."""
SHARES = ("exact", "recall", "choice", "tokens")
"""Fields of `Score` that are between 0 and 1."""


@dataclass(frozen=True)
class Wanted:
    """What is measured, and with how much at once."""

    options: Options
    needles: bool = True
    positions: bool = False
    batch_size: int = 8
    """Texts of the training length, or continuations of prompts, that are computed together."""


@dataclass(frozen=True)
class Cell:
    """The questions of one form and length, at one depth or at all."""

    form: str
    length: int
    depth: float | None
    """None: all depths together."""
    questions: int
    exact: float
    """This and the following are means of `Score`."""
    recall: float
    choice: float
    tokens: float
    nats: float

    def interval(self, share: str) -> tuple[float, float]:
        """The interval of `exact` or `choice` that questions leave (Wilson 1927)."""
        return wilson(getattr(self, share), self.questions)


@dataclass(frozen=True)
class LongContext:
    """What was measured on one model."""

    name: str
    checkpoint: str
    trained_length: int
    """data.sequence_length of its training."""
    cells: Sequence[Cell]
    """For each form and length, first all depths together, then each."""
    positions: ByPosition | None

    def total(self, form: str, length: int) -> Cell:
        """All depths together."""
        return next(each for each in self.cells if (each.form, each.length, each.depth) == (form, length, None))

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "model": self.name,
            "checkpoint": self.checkpoint,
            "trained_length": self.trained_length,
            "needles": [
                {**asdict(cell), **{f"{share}_interval": cell.interval(share) for share in ("exact", "choice")}}
                for cell in self.cells
            ],
            "positions": None if self.positions is None else _positions_json(self.positions),
        }


def _positions_json(found: ByPosition) -> dict[str, Any]:
    return {
        "length": found.length,
        "sequences": len(found.nats_NP),
        "documents": found.documents,
        "blocks": [
            {"first": first, "last": last, "loss": each.mean, "deviation": each.deviation, "interval": _ends(each)}
            for (first, last), each in zip(found.blocks, found.losses, strict=True)
        ],
        "by_sequence": found.nats_NP.tolist(),
    }


def _ends(each: Paired) -> list[float] | None:
    return None if each.low is None or each.high is None else [each.low, each.high]


def measure(trained: TrainedText, name: str, text: Text, wanted: Wanted, progress: Progress) -> LongContext:
    """Measure one model.

    Args:
        trained: the model.
        name: what it is called.
        text: what needles are hidden in, and whose loss is measured.
        wanted: what is measured.
        progress: is told how far it has come.

    Raises: UserError for what cannot be asked of this model, or of this text.
    """
    options, done, total = wanted.options, 0, work(wanted)

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        progress(done, total)

    options.check()
    cells = [*_cells(trained.model, trained.tokenizer, text, wanted, advance)] if wanted.needles else []
    positions = None
    if wanted.positions:
        most = wanted.batch_size * trained.context
        length = max(options.lengths)
        positions = by_position(trained.model, trained.tokenizer, text, length, options.samples, most, advance)
    return LongContext(name, trained.checkpoint, trained.context, cells, positions)


def work(wanted: Wanted) -> int:
    """Questions and sequences of one model."""
    options = wanted.options
    asked = len(options.forms) * len(options.lengths) * len(options.depths) * options.samples
    return asked * wanted.needles + options.samples * wanted.positions


def _cells(
    model: EvaluationModel, tokenizer: Tokenizer, text: Text, wanted: Wanted, advance: Callable[[int], None]
) -> Iterator[Cell]:
    """The cells of all forms and lengths. All questions are made first, since one that cannot be asked is refused."""
    options, haystack = wanted.options, Haystack.of(text, tokenizer)
    together = max(1, wanted.batch_size // (options.needles + 1))
    for form in options.forms:
        for length in options.lengths:
            next(questions(haystack, form, length, options))
    for form in options.forms:
        for length in options.lengths:
            asked, found = questions(haystack, form, length, options), list[tuple[Question, Score]]()
            while batch := list(islice(asked, together)):
                found += zip(batch, _finite(scores(model, tokenizer, batch)), strict=True)
                advance(len(batch))
            yield _cell(form, length, None, (score for _, score in found))
            for depth in options.depths if FORMS[form].has_depth else ():
                yield _cell(form, length, depth, (score for each, score in found if each.depth == depth))


def _finite(found: list[Score]) -> list[Score]:
    """The scores. Raises UserError where they mean nothing."""
    if not all(math.isfinite(each.nats) for each in found):
        raise UserError(
            "the loss on an answer is not finite; expected finite numbers: the model's parameters or its compute type "
            "are the reason"
        )
    return found


def _cell(form: str, length: int, depth: float | None, found: Iterable[Score]) -> Cell:
    all_found = list(found)
    means = {name: float(np.mean([getattr(each, name) for each in all_found])) for name in (*SHARES, "nats")}
    return Cell(form, length, depth, len(all_found), **means)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` independent trials."""
    z = float(ndtri((1 + CONFIDENCE) / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
