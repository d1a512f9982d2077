"""Needles in a haystack of real text, in the style of RULER (Hsieh et al. 2024, arXiv 2404.06654).

The forms are RULER's: one needle; several keys of which one is asked for; several values of one key; and a variable
that is assigned from one to the next. Sentences, sizes and the candidates of the choice are ours: sentences are short,
and a question ends with the words that stand before the answer in the needle, so that a small model of text, which was
never taught to answer questions, can go on from what it has read.

Every part of a question is encoded by itself. So the ids of an answer stand in the prompt as they are to be given, and
a prompt has exactly as many tokens as were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moeport.errors import UserError
from moeport.studies.long_context.text import Haystack

VARIABLES = 3
"""Variables of a chain: the first is given a number, each other the one before it. RULER's default is 5. Ours."""
DIGITS = 4
"""Of a number; RULER has 7. Ours."""
WITHIN = 20
"""A needle is put after the end of a line if one is at most a 20th of the haystack away from its depth."""
Draw = Callable[["Words"], "Drawn"]
"""Draws the needles of one question."""


@dataclass(frozen=True)
class Options:
    """What is asked."""

    lengths: tuple[int, ...]
    """Tokens of a prompt with its answer."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle is in the haystack: 0 at its start, 1 at its end."""
    forms: tuple[str, ...] = ("single", "multi_key", "multi_value", "variable_tracking")
    samples: int = 20
    """Questions of each form and length at each depth; where needles are at depths drawn at random, as many in all."""
    needles: int = 4
    """Keys, values or chains, and candidates of the choice."""
    seed: int = 0

    @property
    def chance(self) -> float:
        """Share of the choices that are right by chance."""
        return 1 / self.needles

    def check(self) -> None:
        """Raises UserError for what cannot be asked."""
        if min(self.lengths) < 1:
            raise UserError(f"--lengths {min(self.lengths)}: expected at least 1 token")
        if unknown := [form for form in self.forms if form not in FORMS]:
            raise UserError(f"--forms {unknown[0]}: is not a form; expected {', '.join(FORMS)}, separated by commas")
        if not self.forms:
            raise UserError(f"--forms: names no form; expected {', '.join(FORMS)}, separated by commas")
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise UserError(f"--depths {wrong[0]:g}: expected numbers from 0, the start of the text, to 1, its end")


@dataclass(frozen=True)
class Question:
    """One prompt and the answers that a model chooses from."""

    form: str
    length: int
    depth: float | None
    """None where needles are at depths drawn at random."""
    prompt_T: np.ndarray
    """Ids, of which the first is the end of text that documents follow."""
    candidates: Sequence[np.ndarray]
    """Ids of the possible answers; the first is right."""
    wanted: Sequence[str]
    """Numbers or names of the right answer."""

    @property
    def answer(self) -> np.ndarray:
        """Ids of the right answer."""
        return self.candidates[0]


@dataclass(frozen=True)
class Drawn:
    """The needles of one question, before they are put into a text. Texts come in parts, encoded one by one."""

    needles: Sequence[tuple[int, Sequence[str]]]
    """Each with its group: those of a group are kept in order."""
    asks: Sequence[str]
    answers: Sequence[Sequence[str]]
    """Of each candidate, the right one first."""


@dataclass(frozen=True)
class Form:
    """A kind of question."""

    draw: Draw
    summary: str
    has_depth: bool
    """Whether one needle is asked for, so that the depth is its own."""


class Words:
    """Draws keys, numbers and names that do not repeat in a question."""

    def __init__(self, rng: np.random.Generator, words: Sequence[str], count: int):
        self.rng, self.count = rng, count
        self._words = words
        self._numbers: set[str] = set()
        self._names: set[str] = set()

    def keys(self, number: int) -> list[str]:
        """Words of the text."""
        if len(self._words) < number:
            raise UserError(
                f"the text has {len(self._words)} different words of 4 to 8 letters without capitals, which keys are "
                f"drawn from; expected at least {number}: give more text, or fewer --needles"
            )
        return [self._words[index] for index in self.rng.choice(len(self._words), number, replace=False)]

    def numbers(self, number: int) -> list[str]:
        """Numbers without a leading zero."""
        first, end = 10 ** (DIGITS - 1), 10**DIGITS
        return self._new(number, self._numbers, end - first, lambda: str(self.rng.integers(first, end)))

    def names(self, number: int) -> list[str]:
        """Names of variables: three capital letters."""
        return self._new(number, self._names, 26**3, lambda: "".join(map(chr, self.rng.integers(65, 91, 3))))

    def _new(self, number: int, used: set[str], of: int, draw: Callable[[], str]) -> list[str]:
        if len(used) + number > of:
            raise UserError(
                f"--needles {self.count}: a question takes more than the {of:,} different numbers or names that there "
                "are; expected fewer needles"
            )
        found: list[str] = []
        while len(found) < number:
            if (each := draw()) not in used:
                used.add(each)
                found.append(each)
        return found


def _single(words: Words) -> Drawn:
    (key,), (value, *others) = words.keys(1), words.numbers(words.count)
    return Drawn([(0, _sentence(key, value))], _asks(key), [[value], *([other] for other in others)])


def _multi_key(words: Words) -> Drawn:
    keys, values = words.keys(words.count), words.numbers(words.count)
    needles = [(group, _sentence(*pair)) for group, pair in enumerate(zip(keys, values, strict=True))]
    return Drawn(needles, _asks(keys[0]), [[value] for value in values])


def _multi_value(words: Words) -> Drawn:
    (key,) = words.keys(1)
    lists = [words.numbers(words.count) for _ in range(words.count)]
    asks = ["\nWhat are all the numbers of", f" {key}", "? The numbers of", f" {key}", " are"]
    return Drawn([(0, _sentence(key, value)) for value in lists[0]], asks, lists)


def _variable_tracking(words: Words) -> Drawn:
    chains = [words.names(VARIABLES) for _ in range(words.count)]
    values, needles = words.numbers(words.count), list[tuple[int, Sequence[str]]]()
    for group, (names, value) in enumerate(zip(chains, values, strict=True)):
        needles.append((group, ["VAR", f" {names[0]}", " =", f" {value}", "\n"]))
        needles += [(group, ["VAR", f" {name}", " = VAR", f" {before}", "\n"]) for before, name in pairwise(names)]
    return Drawn(needles, ["\nWhich variables are", f" {values[0]}", "? They are VAR"], chains)


def _sentence(key: str, value: str) -> list[str]:
    return ["The number of", f" {key}", " is", f" {value}", ".\n"]


def _asks(key: str) -> list[str]:
    return ["\nWhat is the number of", f" {key}", "? The number of", f" {key}", " is"]


FORMS = {
    "single": Form(_single, "One needle; the other candidates are numbers that are in no needle.", True),
    "multi_key": Form(_multi_key, "A needle for each key, of which one is asked for; the others are candidates.", True),
    "multi_value": Form(
        _multi_value, "Several numbers of one key, all to be named; the other candidates stand in no needle.", False
    ),
    "variable_tracking": Form(
        _variable_tracking,
        f"Chains of {VARIABLES} variables, of which all those with one number are to be named; the other chains are "
        "candidates.",
        False,
    ),
}
"""By name."""


def questions(haystack: Haystack, form: str, length: int, options: Options) -> Iterator[Question]:
    """The questions of one form and length. A question is the same whatever else is asked.

    Raises: UserError if the length has no room for them, or the text is too short.
    """
    depths = [*options.depths] if FORMS[form].has_depth else [None] * len(options.depths)
    for place, depth in enumerate(depths):
        for number in range(options.samples):
            where = round(1000 * depth) if depth is not None else place
            keys = [options.seed, [*FORMS].index(form), length, where, number]
            yield question(haystack, form, length, depth, np.random.default_rng(keys), options.needles)


def question(
    haystack: Haystack, form: str, length: int, depth: float | None, rng: np.random.Generator, count: int
) -> Question:
    """One question.

    Args:
        haystack: what the needles are hidden in.
        form: one of `FORMS`.
        length: tokens of the prompt and the longest candidate.
        depth: of the needle that is asked for, for forms that have one; None: drawn at random, as those of all other
            needles.
        rng: draws words, numbers, depths, and where the haystack is cut out of the text.
        count: `Options.needles`.

    Raises: UserError if the length has no room for it, or the text is too short.
    """
    drawn = FORMS[form].draw(Words(rng, haystack.words, count))
    needles = [_joined(haystack, parts) for _, parts in drawn.needles]
    asks = _joined(haystack, drawn.asks)
    candidates = [_listed(haystack, values) for values in drawn.answers]
    taken = 1 + sum(map(len, needles)) + len(asks) + max(map(len, candidates))
    if length <= taken:
        raise UserError(
            f"--lengths {length}: form {form} with --needles {count} takes {taken:,} tokens of this tokenizer by "
            f"itself; expected more, such as {2 * taken:,}, of which half is other text; or fewer --needles"
        )
    room = length - taken
    if room > len(haystack.id_T):
        raise UserError(
            f"--lengths {length}: the text has {len(haystack.id_T):,} tokens; expected at least {room:,} to hide the "
            "needles in: give more with --text"
        )
    start = int(rng.integers(len(haystack.id_T) - room + 1))
    places = [
        min(max(haystack.near(start + round(each * room), room // WITHIN) - start, 0), room)
        for each in _depths([group for group, _ in drawn.needles], depth, rng)
    ]
    parts = _inserted(haystack.id_T[start : start + room], needles, places)
    prompt_T = np.concatenate([[haystack.tokenizer.end_of_text], *parts, asks])
    return Question(form, length, depth, prompt_T, candidates, drawn.answers[0])


def _depths(groups: Sequence[int], depth: float | None, rng: np.random.Generator) -> list[float]:
    """The depth of each needle, ascending in each group; that of the first needle if it is given."""
    found = rng.random(len(groups))
    for group in set(groups):
        own = [index for index, each in enumerate(groups) if each == group]
        found[own] = np.sort(found[own])
    return [*found.tolist()] if depth is None else [depth, *found[1:].tolist()]


def _inserted(hay_T: np.ndarray, needles: Sequence[np.ndarray], places: Sequence[int]) -> Iterator[np.ndarray]:
    """The haystack with each needle at its place; at equal places in their order."""
    done = 0
    for index in sorted(range(len(needles)), key=lambda index: places[index]):
        yield hay_T[done : places[index]]
        yield needles[index]
        done = places[index]
    yield hay_T[done:]


def _joined(haystack: Haystack, parts: Sequence[str]) -> np.ndarray:
    return np.concatenate([haystack.encode(part) for part in parts])


def _listed(haystack: Haystack, values: Sequence[str]) -> np.ndarray:
    """An answer: the values, between them commas."""
    parts = [part for value in values for part in (",", f" {value}")]
    return _joined(haystack, parts[1:])
