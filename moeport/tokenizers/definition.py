"""A tokenizer on disk: one JSON text, stored as tokenizer.json.

Plain BPE is an ordinary tokenizer.json, which every reader understands. Scaffold tokens and LBPE cannot be expressed in
one: their model has a type of ours, so that other readers fail instead of giving other ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moeport.errors import DataError, choices
from moeport.tokenizers.byte_level import to_characters
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.vocabulary import Vocabulary

ENCODINGS = ("merges", "longest_first", "longest_merge")
"""How text becomes tokens: by rank of the merges; LBPE, the longest token first; LBPE, the longest merge first."""

MODEL_TYPE = "moeport/BytePairs"
"""`model.type` of what an ordinary tokenizer.json cannot express."""

FORMAT = 1
"""Version of the model's entries. Readers refuse later ones."""


@dataclass(frozen=True)
class Definition:
    """Everything that decides the ids of a text.

    Args:
        vocabulary: merges and scaffolds.
        encoding: one of `ENCODINGS`.
        pattern: a name from `PATTERNS`, or a regular expression; its matches are the pre-tokens.
        special_tokens: their ids by their text. They have ids of their own and occur in no ordinary text.
        numbers: ids of the ordinary tokens, where they are not numbered from 0 in the order of `vocabulary.tokens`: for
            a vocabulary that was trained elsewhere, which may hold tokens that no merge makes.
        training: choices of the training, for the reader; they decide nothing.
        normalizer: what texts are normalized by before they are cut, of `NORMALIZERS`; None: nothing.

    Raises:
        DataError: the parts do not fit together.
    """

    vocabulary: Vocabulary
    encoding: str = "merges"
    pattern: str = "digits"
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    numbers: Mapping[bytes, int] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    normalizer: str | None = None

    def __post_init__(self) -> None:
        """Refuses what no reader could encode with."""
        if self.encoding not in ENCODINGS:
            raise DataError(f"encoding: got {self.encoding!r}; {choices(self.encoding, ENCODINGS)}")
        _check_numbers(self)

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """The id of each ordinary token."""
        if self.numbers is not None:
            return self.numbers
        return {token: number for number, token in enumerate(self.vocabulary.tokens)}

    @property
    def size(self) -> int:
        """Number of ids, including unused ones below the largest."""
        return max(max(self.ids.values()), *self.special_tokens.values(), 0) + 1

    @property
    def is_ordinary(self) -> bool:
        """Whether an ordinary tokenizer.json expresses it exactly."""
        return (
            self.encoding == "merges"
            and not self.vocabulary.scaffolds
            and len(self.ids) == len(self.vocabulary.merges) + len(self.vocabulary.base)
        )


def numbered(vocabulary: Vocabulary, special_tokens: Iterable[str]) -> dict[str, int]:
    """Ids for special tokens: those after the last ordinary token, in the order given, without repetition."""
    return {token: len(vocabulary.tokens) + number for number, token in enumerate(dict.fromkeys(special_tokens))}


def write_definition(definition: Definition) -> str:
    """The contents of its tokenizer.json; equal definitions give equal texts."""
    ranks = {left + right: rank for rank, (left, right) in enumerate(definition.vocabulary.merges)}
    model: dict[str, Any] = {
        "vocab": {to_characters(token): number for token, number in definition.ids.items()},
        "merges": [[to_characters(left), to_characters(right)] for left, right in definition.vocabulary.merges],
    }
    if definition.is_ordinary:
        model = {**_ORDINARY_MODEL, **model}
    else:
        model = {
            "type": MODEL_TYPE,
            "format": FORMAT,
            "algorithm": definition.vocabulary.algorithm,
            "encoding": definition.encoding,
            "scaffolds": sorted(ranks[token] for token in definition.vocabulary.scaffolds),
            **model,
        }
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **_ADDED}
            for token, number in sorted(definition.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": definition.normalizer} if definition.normalizer else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": expression(definition.pattern)}, **_SPLIT},
                {"type": "ByteLevel", **_BYTE_LEVEL},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **_BYTE_LEVEL},
        "model": {**model, "training": dict(definition.training)},
    }
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"


def expression(pattern: str) -> str:
    """The regular expression of a pattern: that of a name, else the pattern itself."""
    return PATTERNS.get(pattern, pattern)


_ORDINARY_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_SPLIT = {"behavior": "Isolated", "invert": False}
_BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _check_numbers(definition: Definition) -> None:
    """Refuse missing and repeated ids, and special tokens that are ordinary ones."""
    ids, special = definition.ids, definition.special_tokens
    missing = [token for token in _needed(definition) if token not in ids]
    if missing:
        raise DataError(
            f"{len(missing):,} tokens have no id, the first is {missing[0]!r}; expected an id for every single "
            "byte and every token that the encoding gives"
        )
    owner: dict[int, bytes | str] = {}
    numbers: list[tuple[bytes | str, int]] = [*ids.items(), *special.items()]
    for token, number in numbers:
        if number < 0 or number in owner:
            taken = f"that of {owner[number]!r} as well" if number in owner else "negative"
            raise DataError(f"token {token!r} has the id {number}, which is {taken}; expected an id for each token")
        owner[number] = token
    if "" in special:
        raise DataError("a special token is empty; expected text such as '<|endoftext|>'")


def _needed(definition: Definition) -> Iterable[bytes]:
    """Tokens without which some text cannot be encoded."""
    if definition.encoding == "longest_first":
        return definition.vocabulary.base
    return definition.vocabulary.tokens
