"""Text to tokens and back. Every tokenizer is stored as a tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from moeport.data.codecs import codec_of
from moeport.data.tokenizer_json import definition_text
from moeport.errors import DataError
from moeport.files import write_text
from moeport.tokenizers.byte_level import byte_characters
from moeport.tokenizers.patterns import PATTERNS

END_OF_TEXT = "<|endoftext|>"
"""The token that ends a document in tokenizers trained here."""

ENCODING_VERSION = 2
"""Grows when the same tokenizer.json gives other ids for a text; since 2, added tokens are ordinary text."""

SPLIT_PATTERN = PATTERNS["moeport"]
"""BPE merges within these pieces only. Training time grows with the square of the longest piece, which is why lengths
are bounded."""


class Tokenizer:
    """Encodes texts without adding end-of-text tokens. Added tokens spelled out in a text are ordinary text.

    Args:
        definition: contents of the tokenizer.json.
        end_of_text: the token that ends a document.

    Raises:
        DataError: the definition is not a tokenizer, lacks the token, or has ids that cannot be used.
    """

    def __init__(self, definition: str, end_of_text: str = END_OF_TEXT):
        self._definition, self._end_of_text = definition, end_of_text
        self._codec = codec_of(definition, end_of_text)
        vocabulary = self._codec.vocabulary
        self.end_of_text = vocabulary[end_of_text]
        """Id of the token that ends a document."""
        self.vocab_size = max(vocabulary.values()) + 1
        """Number of ids, including unused ones below the largest."""
        self.fingerprint = hashlib.sha256(f"{end_of_text}\n{definition}".encode()).hexdigest()
        """Hexadecimal SHA-256 of the definition and the end-of-text token."""

    @property
    def definition(self) -> str:
        """Contents of the tokenizer.json."""
        return self._definition

    def __reduce__(self) -> tuple[Any, ...]:
        """The library would lose what keeps added tokens out of text."""
        return Tokenizer, (self._definition, self._end_of_text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32, without end-of-text tokens.

        Raises:
            DataError: a pattern of the tokenizer fails or does not come to an end.
        """
        return self._codec.encode_batch(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids, including special tokens. Invalid UTF-8 becomes U+FFFD."""
        return self._codec.decode(np.asarray(ids, np.int64))

    def continuation(self, ids: Sequence[int], start: int) -> str:
        """The text that the ids from `start` on add to those before.

        Decoding the added ids alone would lose the space that many tokenizers drop at the start of a text. Where there
        are none before, the text is that which gives the first id.
        """
        if not start:
            return self._space_before(ids[:1]) + self.decode(ids)
        before, whole = self.decode(ids[:start]), self.decode(ids)
        if whole.startswith(before):  # always, unless the last byte of a character is among the added ids
            return whole[len(before) :]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        return whole[shared:]

    def _space_before(self, first: Sequence[int]) -> str:
        """A space, if a text that begins with this id begins with one that `decode` drops."""
        text = self.decode(first)
        plain, spaced = (ids.tolist() for ids in self.encode_batch([text, f" {text}"]))
        return " " if plain != list(first) == spaced else ""

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json. Raises WriteError."""
        write_text(path, self._definition)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the UTF-8 bytes; 256 is the end of text."""

    def __init__(self) -> None:
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        super().__init__(tokenizer.to_str())

    def __reduce__(self) -> tuple[Any, ...]:
        """A byte tokenizer needs nothing."""
        return ByteTokenizer, ()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of each text, uint32: the same ids as the tokenizer.json gives, in far less memory."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: the training texts.
        vocab_size: number of tokens, including the 256 bytes and the end of text. Small corpora can yield fewer.
    """
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())


def name_of(tokenizer: Tokenizer, number: int) -> str:
    """The text of a token id in quotes; the number of an id that is no whole character, such as a byte of one."""
    text = tokenizer.decode([number])
    return f"id {number}" if "\N{REPLACEMENT CHARACTER}" in text else repr(text)


def load_tokenizer(path: Path, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """Reads a tokenizer.json.

    Args:
        path: the file.
        end_of_text: the token that ends a document.

    Raises:
        DataError: the file cannot be read, is not a tokenizer.json or lacks the token.
    """
    try:
        return Tokenizer(definition_text(path), end_of_text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
