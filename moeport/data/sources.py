"""Reading the documents that a config names."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from moeport.config.data import DataConfig, FilesSource, HuggingFaceSource, StdlibSource
from moeport.data.documents import Corpus, Document, split_as_given, split_by_name
from moeport.data.files import FileReader
from moeport.data.find import file_key, find_files
from moeport.data.huggingface import read_split
from moeport.data.left_out import LeftOut
from moeport.errors import DataError

STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_documents(config: DataConfig, left_out: LeftOut | None = None) -> Corpus:
    """All non-empty documents of the source, split into training and validation. One side may be empty.

    Args:
        config: source and split.
        left_out: what is left out is added to it.

    Raises:
        DataError: files or rows are missing, unreadable or not text, or the source holds images.
    """
    source = config.source
    left_out = LeftOut() if left_out is None else left_out
    if isinstance(source, StdlibSource):
        return split_by_name(_stdlib(), config.validation_fraction, left_out)
    if isinstance(source, FilesSource):
        return _files(source, config.validation_fraction, left_out)
    if isinstance(source, HuggingFaceSource):
        return _huggingface(source, config.validation_fraction, left_out)
    raise DataError(f"data.source.name: {source.name} has images; expected text: stdlib, files or huggingface")


def split_rule(config: DataConfig) -> str:
    """Describes how documents are split, for error messages."""
    source = config.source
    if isinstance(source, FilesSource) and source.validation_paths:
        return "data.source.validation_paths names the validation files"
    if isinstance(source, HuggingFaceSource) and source.validation_split is not None:
        return f"data.source.validation_split is {source.validation_split!r}"
    return f"data.validation_fraction is {config.validation_fraction}"


def _files(source: FilesSource, validation_fraction: float, left_out: LeftOut) -> Corpus:
    reader = FileReader(source)

    def find(patterns: Sequence[str], option: str) -> list[str]:
        return find_files(patterns, source.exclude, reader.is_readable, reader.kinds, option, left_out)

    train_paths = find(source.paths, "data.source.paths")
    if not source.validation_paths:
        documents = reader.read(train_paths, left_out)
        reader.refuse_faults(left_out)
        return split_by_name(documents, validation_fraction, left_out)
    validation_paths = find(source.validation_paths, "data.source.validation_paths")
    train_files = {file_key(path) for path in train_paths}
    for path in validation_paths:
        if file_key(path) in train_files:
            raise DataError(
                f"{path} is named by both data.source.paths and data.source.validation_paths; "
                "validation data must not be trained on: narrow one of the globs"
            )
    train, validation = (reader.read(paths, left_out) for paths in (train_paths, validation_paths))
    reader.refuse_faults(left_out)
    return split_as_given(train, validation, left_out)


def _huggingface(source: HuggingFaceSource, validation_fraction: float, left_out: LeftOut) -> Corpus:
    if source.validation_split == source.split:
        raise DataError(
            f"data.source.split and data.source.validation_split are both {source.split!r}; "
            "validation data must not be trained on: name another split or leave validation_split out"
        )
    train = read_split(source, source.split)
    if source.validation_split is None:
        return split_by_name(train, validation_fraction, left_out)
    return split_as_given(train, read_split(source, source.validation_split), left_out)


def _stdlib() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            try:
                documents.append(Document(path.relative_to(root).as_posix(), path.read_bytes().decode()))
            except UnicodeDecodeError:
                continue
    return sorted(documents)
