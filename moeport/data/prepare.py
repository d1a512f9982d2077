"""From a config to cached token files: read, tokenize, pack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import PositiveFloat, ValidationError

from moeport.config.data import BPETokenizer, DataConfig, FileTokenizer
from moeport.core.section import Section
from moeport.data.cache import cache_dir
from moeport.data.compression import compression_baselines
from moeport.data.documents import Corpus, check_split, documents_fingerprint, size_label
from moeport.data.left_out import LeftOut
from moeport.data.packed import FORMAT_VERSION, PackedTokens, write_tokens
from moeport.data.sources import read_documents, split_rule
from moeport.data.tokenizer import ENCODING_VERSION, SPLIT_PATTERN, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from moeport.data.tokenizer_file import tokenizer_file
from moeport.errors import DataError, WriteError
from moeport.files import make_folder, remove_leftovers, write_text
from moeport.reading import read_bytes


@dataclass(frozen=True)
class PreparedData:
    """Tokenized text, ready for training."""

    train: PackedTokens
    validation: PackedTokens
    tokenizer: Tokenizer
    baselines: dict[str, float]
    """Bits per byte of the validation documents under `gzip` and `xz`."""
    unreadable: int = 0
    """Files and rows that were skipped since they cannot be read."""


def prepare_data(config: DataConfig, *, report: Callable[[str], None]) -> PreparedData:
    """The tokens that the config describes, taken from the cache if they are there.

    Args:
        config: source, tokenizer and sequence length.
        report: receives progress messages and warnings.

    Raises:
        DataError: the data or the tokenizer cannot be used, or the training text is shorter than one sequence.
        WriteError: the cache cannot be written.
    """
    left_out = LeftOut()
    corpus = read_documents(config, left_out)
    check_split(corpus, split_rule(config), left_out)
    for line in left_out.lines():
        report(line)
    entry = _Entry(config, corpus)
    data = replace(entry.load(report) or entry.build(report), unreadable=left_out.unreadable)
    if not data.train.num_sequences:
        raise DataError(
            f"the training text is too short: it has {data.train.num_tokens:,} tokens and one sequence of "
            f"data.sequence_length {config.sequence_length:,} needs {config.sequence_length + 1:,}; "
            "add documents or lower data.sequence_length"
        )
    return data


class _Baselines(Section):
    gzip: PositiveFloat
    xz: PositiveFloat


class _Entry:
    """A folder of the cache. Files are written atomically, compression.json last: it marks the entry complete."""

    def __init__(self, config: DataConfig, corpus: Corpus):
        self._config = config
        self._corpus = corpus
        self._given = _given_tokenizer(config)
        self._fingerprints = [documents_fingerprint(documents) for documents in corpus]
        tokenizer = self._given.fingerprint if self._given else [config.tokenizer.model_dump(), SPLIT_PATTERN]
        rules = [ENCODING_VERSION] if isinstance(config.tokenizer, FileTokenizer) else []
        key = json.dumps([FORMAT_VERSION, self._fingerprints, tokenizer, *rules])
        self._folder = cache_dir(config.cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:32]

    def load(self, report: Callable[[str], None]) -> PreparedData | None:
        """The cached data; None if there is none or, after a warning, if it is damaged."""
        if not self._path("compression.json").exists():
            return None
        try:
            data = self._open()
        except DataError as error:
            report(f"warning: the cache is damaged and will be built again ({error})")
            return None
        report(f"using {data.train.num_tokens:,} training tokens from the cache {self._folder}")
        return data

    def build(self, report: Callable[[str], None]) -> PreparedData:
        """Writes all files and opens them."""
        train, validation = self._corpus
        try:
            make_folder(self._folder)
            remove_leftovers(self._folder)
            tokenizer = self._given or self._train(report)
            tokenizer.save(self._path("tokenizer.json"))
            report(f"encoding {size_label(train)} for training and {size_label(validation)} for validation")
            write_tokens(self._path("train.tokens"), train, tokenizer)
            write_tokens(self._path("validation.tokens"), validation, tokenizer)
            report(f"compressing {size_label(validation)} with gzip and xz for comparison")
            baselines = _Baselines.model_validate(compression_baselines(validation))
            write_text(self._path("compression.json"), baselines.model_dump_json() + "\n")
        except WriteError as error:
            raise WriteError(f"{error} (data.cache_dir or XDG_CACHE_HOME sets the folder)") from error
        return self._open()

    def _open(self) -> PreparedData:
        tokenizer = self._given or load_tokenizer(self._path("tokenizer.json"))
        splits = []
        for name, fingerprint in zip(("train", "validation"), self._fingerprints, strict=True):
            path = self._path(f"{name}.tokens")
            tokens = PackedTokens(path, self._config.sequence_length)
            if tokens.metadata.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(f"{path}: encoded with another tokenizer")
            if tokens.metadata.source_fingerprint != fingerprint:
                raise DataError(f"{path}: encoded from other documents")
            splits.append(tokens)
        train, validation = splits
        return PreparedData(train, validation, tokenizer, self._baselines())

    def _train(self, report: Callable[[str], None]) -> Tokenizer:
        assert isinstance(self._config.tokenizer, BPETokenizer)
        documents = self._corpus.train
        vocab_size = self._config.tokenizer.vocab_size
        report(f"training a BPE tokenizer of {vocab_size:,} tokens on {size_label(documents)}")
        return train_bpe((document.text for document in documents), vocab_size)

    def _baselines(self) -> dict[str, float]:
        path = self._path("compression.json")
        try:
            return _Baselines.model_validate_json(read_bytes(path)).model_dump()
        except (OSError, ValidationError) as error:
            raise DataError(f"{path}: cannot read the compression baselines") from error

    def _path(self, name: str) -> Path:
        return self._folder / name


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer, or None if it has to be trained."""
    if isinstance(config.tokenizer, BPETokenizer):
        return None
    if isinstance(config.tokenizer, FileTokenizer):
        return load_tokenizer(tokenizer_file(config.tokenizer.path), config.tokenizer.end_of_text)
    return ByteTokenizer()
