"""A tokenizer trained on texts, as `moeport tokenizer train` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from moeport.data.tokenizer import END_OF_TEXT
from moeport.errors import UserError, choices
from moeport.tokenizers import Choices, train
from moeport.tokenizers.definition import ENCODINGS, Definition, numbered
from moeport.tokenizers.pretokens import count_words
from moeport.tokenizers.splitting import check_pattern

ALGORITHMS = {
    "bpe": ("bpe", "merges"),
    "scaffold_bpe": ("scaffold_bpe", "merges"),
    "lbpe": ("bpe", "longest_first"),
}
"""By name, how the vocabulary is trained, and how text is encoded."""


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    algorithm: str
    encoding: str
    pattern: str
    tokens: int
    """Bytes and normal tokens."""
    special: tuple[str, ...]
    choices: Choices


def checked(
    algorithm: str,
    vocab_size: int,
    encoding: str | None,
    pattern: str,
    special: Sequence[str] | None,
    choose: Sequence[str] | None,
) -> Plan:
    """The plan that options ask for.

    Raises:
        UserError: names the option that is wrong.
        DataError: the pattern is neither the name of one nor a regular expression.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"--algorithm {algorithm}: {choices(algorithm, ALGORITHMS)}")
    if encoding is not None and encoding not in ENCODINGS:
        raise UserError(f"--encoding {encoding}: {choices(encoding, ENCODINGS)}")
    tokens = tuple(dict.fromkeys((END_OF_TEXT,) if special is None else special))
    if vocab_size - len(tokens) < 256:
        raise UserError(
            f"--vocab-size {vocab_size}: there is no room for 256 bytes and {len(tokens)} special tokens; expected at "
            f"least {256 + len(tokens)}"
        )
    check_pattern(pattern)
    trained, usual = ALGORITHMS[algorithm]
    return Plan(trained, encoding or usual, pattern, vocab_size - len(tokens), tokens, _choices(choose or ()))


def trained(
    plan: Plan, documents: Iterable[str], workers: int | None, progress: Callable[[int], None] | None = None
) -> Definition:
    """Train a tokenizer on documents, which are read once.

    Args:
        plan: what to train.
        documents: the texts.
        workers: processes that count pre-tokens; None: one per core.
        progress: called with the number of normal tokens now and then.

    Raises:
        DataError: the size is out of reach and `unreachable` is error.
    """
    words = count_words(documents, plan.pattern, workers)
    vocabulary = train(words, plan.tokens, plan.algorithm, plan.choices, progress)
    return Definition(
        vocabulary, plan.encoding, plan.pattern, numbered(vocabulary, plan.special), training=asdict(plan.choices)
    )


def _choices(given: Sequence[str]) -> Choices:
    known = {field.name: field for field in fields(Choices)}
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if key not in known or not equals:
            raise UserError(f"--choose {text}: expected KEY=VALUE with a KEY; {choices(key, known)}")
        if isinstance(known[key].default, int):
            if not (value.isascii() and value.isdigit()):
                raise UserError(f"--choose {text}: expected a whole number from 0")
            values[key] = int(value)
        else:
            values[key] = value
    return Choices(**values)
