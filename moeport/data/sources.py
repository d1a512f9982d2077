"""Reading the documents that a config names."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from moeport.config.data import DataConfig, FilesSource, HuggingFaceSource, StdlibSource
from moeport.data.cache import cache_dir
from moeport.data.documents import Corpus, Document
from moeport.data.files import FileReader
from moeport.data.find import file_key, find_files
from moeport.data.huggingface import HubReader
from moeport.data.left_out import LeftOut
from moeport.data.split import Source, Stamp, split
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
    left_out = LeftOut() if left_out is None else left_out
    source = open_source(config, left_out)
    return split(source, config.validation_fraction, left_out, None, lambda what, done, total: None)


def open_source(config: DataConfig, left_out: LeftOut) -> Source:
    """The source of a config; nothing is read yet but the names of files.

    Args:
        config: the source.
        left_out: what is passed over is added to it.

    Raises:
        DataError: files are missing, or the source holds images.
    """
    source = config.source
    if isinstance(source, StdlibSource):
        return Source(lambda _: _stdlib(), None, _refuse_nothing, lambda: None)
    root = str(config.root or "")
    if root and not os.path.isdir(root):
        raise DataError(f"data.root: {root!r} is not a folder (working directory {os.getcwd()})")
    if isinstance(source, FilesSource):
        return _files(source, root, left_out)
    if isinstance(source, HuggingFaceSource):
        return _huggingface(source, root, cache_dir(config.cache_dir))
    raise DataError(f"data.source.name: {source.name} has images; expected text: stdlib, files or huggingface")


def split_rule(config: DataConfig) -> str:
    """Describes how documents are split, for error messages."""
    source = config.source
    if isinstance(source, FilesSource) and source.validation_paths:
        return "data.source.validation_paths names the validation files"
    if isinstance(source, HuggingFaceSource) and source.validation_split is not None:
        return f"data.source.validation_split is {source.validation_split!r}"
    return f"data.validation_fraction is {config.validation_fraction}"


def _files(source: FilesSource, root: str, left_out: LeftOut) -> Source:
    reader = FileReader(source, root)

    def find(patterns: Sequence[str], option: str) -> list[str]:
        named = [_from(root, pattern) for pattern in patterns]
        excluded = [
            os.path.join(glob.escape(root), each) if "/" in each.rstrip("/") else each for each in source.exclude
        ]
        return find_files(named, excluded, reader.is_readable, reader.kinds, option, left_out)

    train_paths = find(source.paths, "data.source.paths")
    validation_paths = find(source.validation_paths, "data.source.validation_paths") if source.validation_paths else []
    train_files = {file_key(path) for path in train_paths}
    for path in validation_paths:
        if file_key(path) in train_files:
            raise DataError(
                f"{path} is named by both data.source.paths and data.source.validation_paths; "
                "validation data must not be trained on: narrow one of the globs"
            )
    return Source(
        lambda left_out: reader.read(train_paths, left_out),
        (lambda left_out: reader.read(validation_paths, left_out)) if validation_paths else None,
        reader.refuse_faults,
        lambda: _stamp([*train_paths, *validation_paths]),
    )


def _from(root: str, pattern: str) -> str:
    """A file, folder or glob that starts from a folder, in whose name nothing is a wildcard."""
    named = os.path.join(root, pattern)
    return named if os.path.lexists(named) else os.path.join(glob.escape(root), pattern)


def _huggingface(source: HuggingFaceSource, root: str, folder: Path) -> Source:
    held_out = source.validation_split
    if held_out == source.split:
        raise DataError(
            f"data.source.split and data.source.validation_split are both {source.split!r}; "
            "validation data must not be trained on: name another split or leave validation_split out"
        )
    reader = HubReader(source, folder, root)
    splits = [source.split, *([] if held_out is None else [held_out])]
    return Source(
        lambda _: reader.read(source.split),
        None if held_out is None else (lambda _: reader.read(held_out)),
        _refuse_nothing,
        lambda: _stamp([file for split in splits for file in reader.files(split)]),
    )


def _refuse_nothing(left_out: LeftOut) -> None:
    """Faults of a dataset are refused where it is read, and what is no text in the standard library is passed over."""


def _stamp(paths: Sequence[str]) -> Stamp | None:
    """The stamp of files; None if one is not there."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return None
        times = status.st_mtime_ns, status.st_ctime_ns  # the second cannot be set back, as copies set the first
        found.append((os.path.abspath(path), status.st_size, *times, status.st_ino))
    return found or None


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            paths[path.relative_to(root).as_posix()] = path
    for name, path in sorted(paths.items()):
        try:
            yield Document(name, path.read_bytes().decode())
        except UnicodeDecodeError:
            continue
