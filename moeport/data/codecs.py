"""What a tokenizer.json says: its vocabulary, and how text becomes ids and back."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from moeport.data.guarded import guarded
from moeport.data.tokenizer_json import check_vocabulary, parse_definition, text_definition
from moeport.errors import DataError
from moeport.reading import parse_json
from moeport.tokenizers.byte_level import to_characters
from moeport.tokenizers.definition import MODEL_TYPE
from moeport.tokenizers.definition_reading import is_ours, read_definition
from moeport.tokenizers.encoder import Encoder


class Codec(Protocol):
    """Text to ids and back."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Ids of all tokens, added ones included."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32; added tokens spelled out in it are ordinary text."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of the ids, including special tokens."""


def codec_of(definition: str, end_of_text: str) -> Codec:
    """The codec of a tokenizer.json.

    Args:
        definition: its contents.
        end_of_text: the token that ends a document.

    Raises:
        DataError: the definition is not a tokenizer, lacks the token, or has ids that cannot be used.
    """
    if _is_ours(definition):
        return EncoderCodec(definition, end_of_text)
    return LibraryCodec(definition, end_of_text)


class EncoderCodec:
    """A tokenizer that only moeport reads: Scaffold-BPE, or LBPE.

    Args:
        definition: contents of the tokenizer.json.
        end_of_text: the token that ends a document.

    Raises:
        DataError: as `codec_of`.
    """

    def __init__(self, definition: str, end_of_text: str):
        found = read_definition(definition)
        check_end_of_text(end_of_text, found.special_tokens, [*found.special_tokens])
        self._encoder = Encoder(found)
        tokens = {to_characters(token): number for token, number in found.ids.items()}
        self.vocabulary = {**tokens, **found.special_tokens}
        check_vocabulary(self.vocabulary)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As of `Codec`."""
        return self._encoder.encode_batch(texts, workers=_threads())

    def decode(self, ids: np.ndarray) -> str:
        """As of `Codec`."""
        return self._encoder.decode(ids).decode(errors="replace")


class LibraryCodec:
    """A tokenizer of Hugging Face tokenizers, computed by that library.

    Args:
        definition: contents of the tokenizer.json.
        end_of_text: the token that ends a document.

    Raises:
        DataError: as `codec_of`.
    """

    def __init__(self, definition: str, end_of_text: str):
        tree, self._tokenizer = parse_definition(definition)
        self.vocabulary = self._tokenizer.get_vocab()
        check_vocabulary(self.vocabulary)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        check_end_of_text(end_of_text, self.vocabulary, special)
        _, self._encoder = parse_definition(text_definition(definition, tree, end_of_text))
        self._encoder.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As of `Codec`.

        Raises:
            DataError: a pattern of the tokenizer fails or does not come to an end.
        """
        batch = list(texts)
        encodings = guarded(
            lambda: self._encoder.encode_batch_fast(batch, add_special_tokens=False), sum(map(len, batch))
        )
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        """As of `Codec`."""
        numbers = ids.tolist()
        return guarded(lambda: self._tokenizer.decode(numbers, skip_special_tokens=False), 16 * len(numbers))


def _threads() -> int | None:
    """As many as the tokenizers library may use, which RAYON_NUM_THREADS limits; None: one per processor."""
    limit = os.environ.get("RAYON_NUM_THREADS", "")
    return int(limit) if limit.isdecimal() and int(limit) else None


def _is_ours(definition: str) -> bool:
    """Whether only moeport reads it; a text that is no JSON is left to the library, which says what is wrong."""
    if MODEL_TYPE.partition("/")[0] not in definition:
        return False
    try:
        return is_ours(parse_json(definition))
    except ValueError:
        return False


def check_end_of_text(token: str, vocabulary: Iterable[str], special: Sequence[str]) -> None:
    """Refuse a vocabulary without the token that ends a document.

    Raises:
        DataError: names what may have been meant.
    """
    if token in vocabulary:
        return
    close = difflib.get_close_matches(token, special, n=1, cutoff=0.3) or difflib.get_close_matches(
        token, vocabulary, n=1
    )
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    raise DataError(
        f"the vocabulary has no token {token!r}; {suggestion}"
        f"special tokens: {', '.join(special) or 'none'}; set data.tokenizer.end_of_text"
    )
