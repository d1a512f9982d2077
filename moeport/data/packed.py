"""Documents packed into one memory-mapped file of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from moeport.core.section import Section
from moeport.data.documents import Document, documents_fingerprint
from moeport.data.tokenizer import Tokenizer
from moeport.errors import DataError
from moeport.files import atomic_file, write_text
from moeport.reading import open_file, read_bytes

FORMAT_VERSION = 1
CHARACTERS_PER_BATCH = 1_000_000
TOKENS_PER_BLOCK = 1 << 24


class TokenMetadata(Section):
    """Contents of the JSON file beside a token file."""

    format_version: int
    """Layout of the token file."""
    vocab_size: PositiveInt
    """Every id is below it."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint`."""
    source_fingerprint: str
    """SHA-256 of the names and texts of the documents."""
    num_tokens: PositiveInt
    """Tokens in the file, including the end of text before the first document."""
    num_documents: NonNegativeInt
    """Documents in the file."""
    num_bytes: NonNegativeInt
    """UTF-8 bytes of the documents."""
    sha256: str
    """SHA-256 of the token file."""


def write_tokens(path: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> TokenMetadata:
    """Writes a token file and, at `metadata_path(path)`, its metadata, replacing existing files.

    The file holds one end of text, then each document followed by an end of text. Tokens are little-endian: uint16 for
    vocabularies of at most 65536 ids, uint32 for larger ones.

    Args:
        path: the token file.
        documents: texts in order.
        tokenizer: encodes the texts.
    """
    dtype = _dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_text], dtype)
    digest = hashlib.sha256()
    num_tokens = 0
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for tokens in _encoded(documents, tokenizer, end):
            data = tokens.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += len(tokens)
    metadata = TokenMetadata(
        format_version=FORMAT_VERSION,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source_fingerprint=documents_fingerprint(documents),
        num_tokens=num_tokens,
        num_documents=len(documents),
        num_bytes=sum(document.num_bytes for document in documents),
        sha256=digest.hexdigest(),
    )
    write_text(metadata_path(path), metadata.model_dump_json(indent=2) + "\n")
    return metadata


class PackedTokens:
    """A token file, cut into sequences of S tokens, whose targets are the tokens that follow.

    Args:
        path: the token file.
        sequence_length: S.

    Raises:
        DataError: the file or its metadata is missing, damaged or in another format.
    """

    def __init__(self, path: Path, sequence_length: int):
        self.metadata = _read_metadata(metadata_path(path))
        self.sequence_length = sequence_length
        dtype = _dtype(self.metadata.vocab_size)
        _check_file(path, self.metadata.num_tokens * dtype.itemsize, self.metadata.sha256)
        self._tokens = np.memmap(path, dtype, mode="r")

    @property
    def num_tokens(self) -> int:
        """Tokens in the file. All except the first are predicted."""
        return self.metadata.num_tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return self.metadata.num_bytes

    @property
    def num_documents(self) -> int:
        """Documents in the file."""
        return self.metadata.num_documents

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the token file."""
        return self.metadata.sha256

    def token_counts(self) -> np.ndarray:
        """Number of occurrences of each vocabulary id in the file, (V,) int64."""
        counts_V = np.zeros(self.metadata.vocab_size, np.int64)
        for start in range(0, self.num_tokens, TOKENS_PER_BLOCK):
            counts_V += np.bincount(self._tokens[start : start + TOKENS_PER_BLOCK], minlength=len(counts_V))
        return counts_V

    def first(self, count: int) -> np.ndarray:
        """The first tokens of the first document, at most `count`, int64."""
        return self._window(1, count - 1)

    @property
    def num_sequences(self) -> int:
        """Number of full sequences. Each takes S + 1 tokens and shares one with the next sequence."""
        return (self.num_tokens - 1) // self.sequence_length

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (S,) and targets (S,) of one full sequence, int64."""
        tokens = self._window(index * self.sequence_length, self.sequence_length)
        return tokens[:-1], tokens[1:]

    def batch(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (B, S) and targets (B, S) of full sequences, int64."""
        tokens = np.stack([self._window(index * self.sequence_length, self.sequence_length) for index in indices_B])
        return tokens[:, :-1], tokens[:, 1:]

    def windows(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of inputs (B, S) and targets (B, S), int64, in which every token except the first is a target once.

        B is `batch_size`, or less for the last full sequences. Remaining tokens come last, as (1, S') with S' < S.
        """
        for first in range(0, self.num_sequences, batch_size):
            yield self.batch(np.arange(first, min(first + batch_size, self.num_sequences)))
        covered = self.num_sequences * self.sequence_length
        rest = self.num_tokens - 1 - covered
        if rest:
            tokens = self._window(covered, rest)[None]
            yield tokens[:, :-1], tokens[:, 1:]

    def _window(self, start: int, length: int) -> np.ndarray:
        return self._tokens[start : start + length + 1].astype(np.int64)


def metadata_path(path: Path) -> Path:
    """Path of the metadata of a token file."""
    return path.with_suffix(".json")


def _dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _encoded(documents: Sequence[Document], tokenizer: Tokenizer, end: np.ndarray) -> Iterator[np.ndarray]:
    yield end
    for texts in _text_batches(documents):
        for tokens in tokenizer.encode_batch(texts):
            yield tokens
            yield end


def _text_batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    """Texts in order, in batches small enough to encode in little memory."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= CHARACTERS_PER_BATCH:
            yield texts
            texts, size = [], 0
    yield texts


def _read_metadata(path: Path) -> TokenMetadata:
    try:
        metadata = TokenMetadata.model_validate_json(read_bytes(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the metadata of the tokens: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(f"{path}: not the metadata of a token file") from error
    if metadata.format_version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {metadata.format_version}, expected {FORMAT_VERSION}")
    return metadata


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise DataError(f"{path}: {found:,} bytes, expected {size:,}: the tokens are truncated or foreign")
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokens: {error.strerror}") from error
    if digest != sha256:
        raise DataError(f"{path}: the checksum of the tokens is not the one in their metadata")
