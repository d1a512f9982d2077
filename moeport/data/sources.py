"""Reading the documents that a config names."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from moeport.config.data import DataConfig, FilesSource, HuggingFaceSource, StdlibSource
from moeport.data.documents import Corpus, Document, split_by_name, without_empty
from moeport.data.files import find_files, read_files
from moeport.data.huggingface import read_split
from moeport.errors import DataError

STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_documents(config: DataConfig) -> Corpus:
    """All non-empty documents of the source, split into training and validation.

    Raises:
        DataError: files or rows are missing, unreadable or not text, one side is empty, or the source holds images.
    """
    source = config.source
    if isinstance(source, StdlibSource):
        return split_by_name(_stdlib(), config.validation_fraction)
    if isinstance(source, FilesSource):
        return _files(source, config.validation_fraction)
    if isinstance(source, HuggingFaceSource):
        return _huggingface(source, config.validation_fraction)
    raise DataError(f"data.source.name: {source.name} has images; expected text: stdlib, files or huggingface")


def _files(source: FilesSource, validation_fraction: float) -> Corpus:
    train_paths = find_files(source.paths, "data.source.paths")
    if not source.validation_paths:
        return split_by_name(read_files(train_paths, source.text_field), validation_fraction)
    validation_paths = find_files(source.validation_paths, "data.source.validation_paths")
    train_files = {os.path.realpath(path) for path in train_paths}
    for path in validation_paths:
        if os.path.realpath(path) in train_files:
            raise DataError(
                f"{path} is named by both data.source.paths and data.source.validation_paths; "
                "validation data must not be trained on: narrow one of the globs"
            )
    return without_empty(
        read_files(train_paths, source.text_field),
        read_files(validation_paths, source.text_field),
        "data.source.validation_paths names the validation files",
    )


def _huggingface(source: HuggingFaceSource, validation_fraction: float) -> Corpus:
    if source.validation_split == source.split:
        raise DataError(
            f"data.source.split and data.source.validation_split are both {source.split!r}; "
            "validation data must not be trained on: name another split or leave validation_split out"
        )
    train = read_split(source, source.split)
    if source.validation_split is None:
        return split_by_name(train, validation_fraction)
    validation = read_split(source, source.validation_split)
    return without_empty(train, validation, f"data.source.validation_split is {source.validation_split!r}")


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
