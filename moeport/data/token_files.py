"""Token files: how they are written, in shards, and what the JSON file beside them says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from moeport.core.section import Section
from moeport.data.documents import Document, Tally
from moeport.data.encoders import encoded_batches
from moeport.data.split import Progress
from moeport.data.tokenizer import Tokenizer
from moeport.errors import DataError
from moeport.files import atomic_file, write_text
from moeport.reading import open_file, read_bytes
from moeport.tokenizers.pretokens import in_batches

FORMAT_VERSION = 1
CHARACTERS_PER_BATCH = 1_000_000
TOKENS_PER_SHARD = 1 << 26
"""A shard ends with the document with which it has at least this many tokens."""
HASHING_THREADS = 8


class Shard(Section):
    """A part of a stream of tokens: whole documents, in a file of its own."""

    num_tokens: PositiveInt
    """Tokens in the file; the first shard begins with an end of text."""
    num_documents: NonNegativeInt
    """Documents in the file."""
    sha256: str
    """SHA-256 of the file."""


class TokenMetadata(Section):
    """Contents of the JSON file beside the token files."""

    format_version: int
    """Layout of the token files."""
    vocab_size: PositiveInt
    """Every id is below it."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint`."""
    source_fingerprint: str
    """SHA-256 of the names and texts of the documents."""
    num_tokens: PositiveInt
    """Tokens in the stream, including the end of text before the first document."""
    num_documents: NonNegativeInt
    """Documents in the stream."""
    num_bytes: NonNegativeInt
    """UTF-8 bytes of the documents."""
    sha256: str
    """SHA-256 of the stream, however it is divided into files."""
    shards: tuple[Shard, ...] = ()
    """The files, if there are several."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Type of a token in the files."""
        return token_dtype(self.vocab_size)

    @property
    def files(self) -> tuple[Shard, ...]:
        """The files, of which there is at least one."""
        return self.shards or (Shard(num_tokens=self.num_tokens, num_documents=self.num_documents, sha256=self.sha256),)


@dataclass(frozen=True)
class Writing:
    """How token files are written."""

    workers: int = 1
    """Processes that encode; 1: this one."""
    kept: Sequence[Shard] = ()
    """Shards that an interrupted process has written, from the first on."""
    keep: Callable[[Sequence[Shard]], None] = lambda shards: None
    """Is told of the shards that are complete."""
    progress: Progress = lambda what, done, total: None
    """Is told how many bytes of text were encoded."""
    num_bytes: int = 0
    """Bytes of all documents, for the progress; 0: not known."""


def write_tokens(
    path: Path, documents: Iterable[Document], tokenizer: Tokenizer, writing: Writing = Writing()
) -> TokenMetadata:
    """Writes token files and, at `metadata_path(path)`, their metadata, replacing existing files.

    The stream holds one end of text, then each document followed by an end of text. Tokens are little-endian: uint16
    for vocabularies of at most 65536 ids, uint32 for larger ones. The memory depends on the longest document only.

    Args:
        path: the token file; further shards are at `shard_path(path, number)`.
        documents: texts in order.
        tokenizer: encodes the texts.
        writing: how.
    """
    dtype, tally = token_dtype(tokenizer.vocab_size), Tally()
    whole = hashlib.sha256()
    shards = _intact(path, writing.kept, dtype, whole)
    texts = _texts(documents, tally, sum(shard.num_documents for shard in shards), writing)
    batches = encoded_batches(tokenizer, in_batches(texts, CHARACTERS_PER_BATCH), writing.workers)
    with closing(batches):
        ends = np.array([tokenizer.end_of_text], dtype)
        encoded = _with_ends(chain.from_iterable(batches), ends)
        first = next(encoded, None)
        while first is not None or not shards:
            shard, first = _write_shard(shard_path(path, len(shards)), first, encoded, [] if shards else [ends], whole)
            shards.append(shard)
            writing.keep(shards)
    metadata = TokenMetadata(
        format_version=FORMAT_VERSION,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source_fingerprint=tally.fingerprint,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=tally.count,
        num_bytes=tally.num_bytes,
        sha256=whole.hexdigest(),
        shards=tuple(shards) if len(shards) > 1 else (),
    )
    left_out = None if metadata.shards else {"shards"}  # as versions wrote it that knew no shards
    write_text(metadata_path(path), metadata.model_dump_json(indent=2, exclude=left_out) + "\n")
    return metadata


def read_metadata(path: Path) -> TokenMetadata:
    """The metadata of a token file.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    path = metadata_path(path)
    try:
        metadata = TokenMetadata.model_validate_json(read_bytes(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the metadata of the tokens: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(f"{path}: not the metadata of a token file") from error
    if metadata.format_version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {metadata.format_version}, expected {FORMAT_VERSION}")
    if metadata.shards and sum(shard.num_tokens for shard in metadata.shards) != metadata.num_tokens:
        raise DataError(f"{path}: not the metadata of a token file")
    return metadata


def check_files(path: Path, metadata: TokenMetadata) -> None:
    """Compare the token files with their sizes and checksums.

    Raises:
        DataError: a file is missing or damaged.
    """
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for _ in threads.map(
            lambda pair: _check_file(shard_path(path, pair[0]), pair[1], metadata.dtype), enumerate(metadata.files)
        ):
            pass


def metadata_path(path: Path) -> Path:
    """Path of the metadata of a token file."""
    return path.with_suffix(".json")


def shard_path(path: Path, number: int) -> Path:
    """Path of a shard: the first is the token file itself, the next ones are train-1.tokens, train-2.tokens, ..."""
    return path.with_stem(f"{path.stem}-{number}") if number else path


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Type of the tokens of a vocabulary in files."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _write_shard(
    path: Path, first: np.ndarray | None, rest: Iterator[np.ndarray], before: Sequence[np.ndarray], whole: Any
) -> tuple[Shard, np.ndarray | None]:
    """Write documents until there are enough tokens.

    Args:
        path: the file.
        first: the first document; None: there is none.
        rest: the others.
        before: what stands before them.
        whole: the hash of the whole stream, which is updated.

    Returns the shard and the first document of the next one, if there is one.
    """
    digest = hashlib.sha256()
    num_tokens, num_documents, following = 0, 0, first
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for part in before:
            num_tokens += _put(part, file, digest, whole)
        while following is not None and num_tokens < TOKENS_PER_SHARD:
            num_tokens += _put(following, file, digest, whole)
            num_documents += 1
            following = next(rest, None)
    return Shard(num_tokens=num_tokens, num_documents=num_documents, sha256=digest.hexdigest()), following


def _put(tokens: np.ndarray, file: Any, *digests: Any) -> int:
    data = tokens.tobytes()
    file.write(data)
    for digest in digests:
        digest.update(data)
    return len(tokens)


def _with_ends(encoded: Iterable[np.ndarray], end: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens of each document, followed by the end of text, in the type of the file."""
    for tokens in encoded:
        yield np.concatenate([tokens.astype(end.dtype), end])


def _texts(documents: Iterable[Document], tally: Tally, skipped: int, writing: Writing) -> Iterator[str]:
    """The texts that are not yet in a shard; all documents are counted."""
    for document in documents:
        tally.add(document.key, document.text.encode())
        writing.progress("encoding", tally.num_bytes, writing.num_bytes)
        if tally.count > skipped:
            yield document.text


def _intact(path: Path, kept: Sequence[Shard], dtype: np.dtype[Any], whole: Any) -> list[Shard]:
    """The shards up to the first that is not as it was written; `whole` is updated with them."""
    intact = []
    for number, shard in enumerate(kept):
        try:
            _check_file(shard_path(path, number), shard, dtype)
        except DataError:
            break
        with open_file(shard_path(path, number)) as file:
            while block := file.read(1 << 20):
                whole.update(block)
        intact.append(shard)
    return intact


def _check_file(path: Path, shard: Shard, dtype: np.dtype[Any]) -> None:
    size = shard.num_tokens * dtype.itemsize
    try:
        found = path.stat().st_size
        if found != size:
            raise DataError(f"{path}: {found:,} bytes, expected {size:,}: the tokens are truncated or foreign")
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokens: {error.strerror}") from error
    if digest != shard.sha256:
        raise DataError(f"{path}: the checksum of the tokens is not the one in their metadata")
