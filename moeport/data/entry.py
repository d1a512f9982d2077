"""A folder of the cache: a tokenizer, the tokens of both sides of a split, and how well gzip and xz compress."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import PositiveFloat, ValidationError

from moeport.config.data import DataConfig, FileTokenizer
from moeport.core.section import Section
from moeport.data.cache import cache_dir
from moeport.data.compression import MAX_BYTES, compression_baselines
from moeport.data.documents import ChangedError, Corpus, Documents, size_label
from moeport.data.mixture import MixedTokens
from moeport.data.packed import PackedTokens
from moeport.data.split import Progress
from moeport.data.token_files import FORMAT_VERSION, Shard, Writing, write_tokens
from moeport.data.tokenizer import ENCODING_VERSION, ByteTokenizer, Tokenizer, load_tokenizer
from moeport.data.trained_tokenizer import train_tokenizer, training_key
from moeport.errors import DataError, WriteError
from moeport.files import make_folder, remove_leftovers, write_text
from moeport.launch.machine import cores_per_rank
from moeport.pages.words import counted
from moeport.reading import read_bytes

MIN_BYTES_FOR_WORKERS = 2**25
"""Less text is encoded before processes would have started."""
SIDES = ("train", "validation")


Tokens = TypeVar("Tokens", bound=PackedTokens | MixedTokens, covariant=True)


@dataclass(frozen=True)
class PreparedData(Generic[Tokens]):
    """Tokenized text, ready for training."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    baselines: dict[str, float]
    """Bits per byte of the validation documents under `gzip` and `xz`."""
    unreadable: int = 0
    """Files and rows that were skipped since they cannot be read."""


@dataclass(frozen=True)
class Work:
    """How an entry is built."""

    report: Callable[[str], None]
    """Receives messages and warnings."""
    progress: Progress
    """Is told how much was done."""
    workers: int | None
    """Processes that encode; None: one per core, unless there is little text."""

    def workers_for(self, tokenizer: Tokenizer, num_bytes: int) -> int:
        """Processes that encode this much text."""
        if self.workers is not None:
            return self.workers
        is_little = num_bytes < MIN_BYTES_FOR_WORKERS or isinstance(tokenizer, ByteTokenizer)
        return 1 if is_little else cores_per_rank(None)


class Baselines(Section):
    """Contents of compression.json."""

    gzip: PositiveFloat
    """Bits per byte."""
    xz: PositiveFloat
    """Bits per byte."""


class _Unfinished(Section):
    """What an interrupted process has written; deleted when everything is."""

    tokenizer_fingerprint: str
    shards: dict[str, tuple[Shard, ...]]


class Entry:
    """A folder of the cache. Files are written atomically, compression.json last: it marks the entry complete.

    Args:
        config: cache folder, tokenizer and sequence length.
        corpus: the documents.
        given: the tokenizer; None: one is trained on the training documents.
    """

    def __init__(self, config: DataConfig, corpus: Corpus, given: Tokenizer | None):
        self._config, self._corpus, self._given = config, corpus, given
        self._fingerprints = [documents.fingerprint for documents in corpus]
        tokenizer = given.fingerprint if given else training_key(config.tokenizer)
        rules = [ENCODING_VERSION] if isinstance(config.tokenizer, FileTokenizer) else []
        key = json.dumps([FORMAT_VERSION, self._fingerprints, tokenizer, *rules])
        self.folder = cache_dir(config.cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:32]
        """The folder, which may not exist yet."""

    @property
    def is_complete(self) -> bool:
        """Whether everything has been written."""
        return self._path("compression.json").exists()

    def shards(self) -> dict[str, Sequence[Shard]]:
        """By side, the shards that an interrupted process has written."""
        unfinished = self._unfinished()
        return dict(unfinished.shards) if unfinished else {}

    def load(self, report: Callable[[str], None]) -> PreparedData[PackedTokens] | None:
        """The cached data; None if there is none or, after a warning, if it is damaged."""
        if not self.is_complete:
            return None
        try:
            data = self.open()
        except DataError as error:
            report(f"warning: the cache is damaged and will be built again ({error})")
            return None
        report(f"using {data.train.num_tokens:,} training tokens from the cache {self.folder}")
        return data

    def build(self, work: Work) -> PreparedData[PackedTokens]:
        """Writes all files and opens them. What an interrupted process has written is kept."""
        train, validation = self._corpus
        try:
            make_folder(self.folder)
            remove_leftovers(self.folder)
            tokenizer, shards = self._started(work)
            work.report(f"encoding {size_label(train)} for training and {size_label(validation)} for validation")
            for name, documents in zip(SIDES, self._corpus, strict=True):
                self._write(name, documents, tokenizer, shards, work)
            work.report(f"compressing {_compressed_label(validation)} with gzip and xz for comparison")
            baselines = Baselines.model_validate(compression_baselines(validation))
            write_text(self._path("compression.json"), baselines.model_dump_json() + "\n")
            self._path("unfinished.json").unlink(missing_ok=True)
        except WriteError as error:
            raise WriteError(f"{error} (data.cache_dir or XDG_CACHE_HOME sets the folder)") from error
        return self.open()

    def open(self) -> PreparedData[PackedTokens]:
        """The data of a complete entry.

        Raises:
            DataError: it is damaged.
        """
        tokenizer = self._given or load_tokenizer(self._path("tokenizer.json"))
        splits = []
        for name, fingerprint in zip(SIDES, self._fingerprints, strict=True):
            path = self._path(f"{name}.tokens")
            tokens = PackedTokens(path, self._config.sequence_length)
            if tokens.metadata.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(f"{path}: encoded with another tokenizer")
            if tokens.metadata.source_fingerprint != fingerprint:
                raise DataError(f"{path}: encoded from other documents")
            splits.append(tokens)
        train, validation = splits
        return PreparedData(train, validation, tokenizer, self._baselines())

    def _started(self, work: Work) -> tuple[Tokenizer, dict[str, tuple[Shard, ...]]]:
        """The tokenizer, which is saved, and the shards that an interrupted process has written with it."""
        unfinished = self._unfinished()
        tokenizer = self._given
        if tokenizer is None and unfinished:
            try:
                tokenizer = load_tokenizer(self._path("tokenizer.json"))
            except DataError:
                unfinished = None
        if tokenizer is None:
            tokenizer = train_tokenizer(self._config, [self._corpus.train], work.report)
        shards: dict[str, tuple[Shard, ...]] = {}
        if unfinished and unfinished.tokenizer_fingerprint == tokenizer.fingerprint:
            shards = unfinished.shards
            kept = sum(map(len, shards.values()))
            work.report(f"continuing in {self.folder}: {counted(kept, 'shard')} of tokens there")
        tokenizer.save(self._path("tokenizer.json"))
        return tokenizer, dict(shards)

    def _write(
        self, name: str, documents: Documents, tokenizer: Tokenizer, shards: dict[str, tuple[Shard, ...]], work: Work
    ) -> None:
        def keep(done: Sequence[Shard]) -> None:
            shards[name] = tuple(done)
            unfinished = _Unfinished(tokenizer_fingerprint=tokenizer.fingerprint, shards=shards)
            write_text(self._path("unfinished.json"), unfinished.model_dump_json() + "\n")

        workers = work.workers_for(tokenizer, documents.num_bytes)
        writing = Writing(workers, shards.get(name, ()), keep, work.progress, documents.num_bytes)
        written = write_tokens(self._path(f"{name}.tokens"), documents, tokenizer, writing)
        if written.source_fingerprint != documents.fingerprint:
            self._path("unfinished.json").unlink(missing_ok=True)  # its shards may hold the other documents
            raise ChangedError("data.source: the documents were changed while they were read; start again")

    def _unfinished(self) -> _Unfinished | None:
        try:
            return _Unfinished.model_validate_json(read_bytes(self._path("unfinished.json")))
        except (OSError, ValidationError):
            return None

    def _baselines(self) -> dict[str, float]:
        path = self._path("compression.json")
        try:
            return Baselines.model_validate_json(read_bytes(path)).model_dump()
        except (OSError, ValidationError) as error:
            raise DataError(f"{path}: cannot read the compression baselines") from error

    def _path(self, name: str) -> Path:
        return self.folder / name


def check_length(tokens: PackedTokens, sequence_length: int) -> None:
    """Refuse a text that is shorter than one sequence.

    Raises:
        DataError: it is.
    """
    if not tokens.num_sequences:
        raise DataError(
            f"the training text is too short: it has {tokens.num_tokens:,} tokens and one sequence of "
            f"data.sequence_length {sequence_length:,} needs {sequence_length + 1:,}; "
            "add documents or lower data.sequence_length"
        )


def _compressed_label(documents: Documents) -> str:
    if documents.num_bytes <= MAX_BYTES:
        return size_label(documents)
    return f"the first {MAX_BYTES / 1e6:.0f} MB of {size_label(documents)}"
