"""The tokenizers that are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeport.data.guarded import guarded
from moeport.data.tokenizer_file import ARGUMENT, tokenizer_file
from moeport.data.tokenizer_json import definition_text, parse_definition, text_definition
from moeport.errors import DataError, UserError
from moeport.tokenizers.byte_level import from_characters
from moeport.tokenizers.definition import Definition
from moeport.tokenizers.definition_reading import is_ours, read_definition
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.vocabulary import Vocabulary

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""From texts to the ids of each."""


@dataclass(frozen=True)
class Subject:
    """A tokenizer."""

    name: str
    path: Path
    encode: Encode
    ids_V: np.ndarray
    """Ids of the ordinary tokens, without special ones."""
    tokens: Sequence[bytes] | None
    """The bytes of each of them; None: they are not bytes of the text, as in SentencePiece."""
    scaffolds: int
    """Tokens that only training and encoding know."""
    plain: Subject | None
    """Where there are scaffolds: BPE of the same number of tokens, pattern and encoding, from the same training."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Bytes of each token (V,)."""
        return None if self.tokens is None else np.array([len(token) for token in self.tokens])


def open_subjects(named: Sequence[str]) -> list[Subject]:
    """The tokenizers in order, each with a name of its own.

    Args:
        named: `PATH` or `NAME=PATH`, where PATH is as in data.tokenizer.path. Without a name, that of the file, or of
            its folder where the file is called tokenizer.json.

    Raises:
        DataError: a tokenizer cannot be read.
        UserError: two have the same name.
    """
    subjects: list[Subject] = []
    for text in named:
        name, path = _named(text)
        if any(name == each.name for each in subjects):
            raise UserError(f"two tokenizers are called {name!r}: name them, as in small={path}")
        subjects.append(_open(name, path))
    return subjects


def _named(text: str) -> tuple[str, Path]:
    name, equals, place = text.partition("=")
    if equals and name and "/" not in name:
        return name, tokenizer_file(Path(place), ARGUMENT)
    path = tokenizer_file(Path(text), ARGUMENT)
    own = path.resolve()
    return (own.parent.name if own.name == "tokenizer.json" else own.stem), path


def _open(name: str, path: Path) -> Subject:
    try:
        text = definition_text(path)
        try:
            return _of_definition(name, path, read_definition(text))
        except DataError:
            tree, tokenizer = parse_definition(text)
            if is_ours(tree):
                raise
            return _of_library(name, path, text, tree, tokenizer)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _of_definition(name: str, path: Path, definition: Definition) -> Subject:
    vocabulary, encoder = definition.vocabulary, Encoder(definition)
    plain = None
    if vocabulary.scaffolds:
        merges = vocabulary.merges[: len(vocabulary.tokens) - len(vocabulary.base)]
        old = Vocabulary("bpe", merges, frozenset(), vocabulary.base)
        plain = _of_definition(name, path, replace(definition, vocabulary=old, numbers=None, special_tokens={}))
    return Subject(
        name,
        path,
        encoder.encode_batch,
        np.fromiter(definition.ids.values(), np.int64),
        list(definition.ids),
        len(vocabulary.scaffolds),
        plain,
    )


def _of_library(name: str, path: Path, text: str, tree: Any, tokenizer: Any) -> Subject:
    """What our encoder does not know, encoded by the tokenizers library. Text spells no special token."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = {each.content for each in added if each.special} - {_unknown(tree["model"])}
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids = {token: number for token, number in ranked if token not in special}
    if len(ids) < 2:
        raise DataError(f"tokens besides special ones: {len(ids)}; expected a trained tokenizer")
    _, encoder = parse_definition(text_definition(text, tree, ""))
    encoder.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        batch = list(texts)
        found = guarded(lambda: encoder.encode_batch_fast(batch, add_special_tokens=False), sum(map(len, batch)))
        return [np.array(each.ids, np.int64) for each in found]

    plain = {each.content for each in added}
    is_bytes = (tree.get("decoder") or {}).get("type") == "ByteLevel"
    tokens = [token.encode() if token in plain else from_characters(token) for token in ids] if is_bytes else None
    return Subject(name, path, encode, np.fromiter(ids.values(), np.int64), tokens, 0, None)


def _unknown(model: Mapping[str, Any]) -> str | None:
    """The token that stands for text outside the vocabulary, which Unigram names by its place."""
    place = model.get("unk_id")
    return model.get("unk_token") if place is None else model["vocab"][place][0]
