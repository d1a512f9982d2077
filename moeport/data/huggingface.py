"""Documents of Hugging Face datasets."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from moeport.config.data import HuggingFaceSource
from moeport.data.documents import Document, MissingPackageError, checked_text, no_column
from moeport.data.left_out import LeftOut
from moeport.errors import DataError, MoeportError
from moeport.files import atomic_file
from moeport.optional import load


def import_datasets() -> ModuleType:
    """The `datasets` package with its logging silenced, since failures raise errors.

    Raises:
        MissingPackageError: the package cannot be imported.
    """
    datasets: ModuleType = load(
        "datasets", "reading a parquet file or a Hugging Face dataset", "data", MissingPackageError
    )
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


class HubReader:
    """Reads a dataset, which it opens once.

    Args:
        source: the dataset.
        folder: keeps the texts of a dataset that is streamed, so that it is read from the hub only once.
        root: the folder that the path of a dataset starts from; empty: the working directory.
    """

    def __init__(self, source: HuggingFaceSource, folder: Path, root: str = ""):
        self._source, self._folder, self._root = source, folder, root
        self._rows: dict[str, Any] = {}

    def read(self, split: str) -> Iterator[Document]:
        """One document per row of a split, named `dataset:split:row`, counted from 1.

        Raises:
            DataError: the dataset, the split or the column does not exist or cannot be read, or rows hold no text.
        """
        name = f"{self._source.dataset}:{split}"
        if not self._source.streaming:
            yield from _documents(row_documents(self._opened(split), self._source.text_field, name))
            return
        kept = self._streamed(split)
        if not kept.exists():
            rows = _unbroken(_documents(row_documents(self._loaded(split), self._source.text_field, name)), name)
            with atomic_file(kept) as temporary, gzip.open(temporary, "wt", compresslevel=1, encoding="utf-8") as file:
                for document in rows:
                    file.write(json.dumps(document.text) + "\n")
        with gzip.open(kept, "rt", encoding="utf-8") as file:
            try:
                for number, line in enumerate(file, 1):
                    yield Document(f"{name}:{number}", json.loads(line))
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise DataError(f"{kept}: damaged ({error}); delete it, and it will be made again") from error

    def files(self, split: str) -> list[str]:
        """The files on this machine that hold a split."""
        if self._source.streaming:
            return [str(self._streamed(split))]
        return [file["filename"] for file in self._opened(split).cache_files]

    def _opened(self, split: str) -> Any:
        if split not in self._rows:
            self._rows[split] = self._loaded(split)
        return self._rows[split]

    def _loaded(self, split: str) -> Any:
        """The rows of a split; a relative folder is looked for in the root, which is no part of its name."""
        dataset = self._source.dataset
        path = os.path.join(self._root, dataset) if dataset.startswith(".") else dataset
        return _load(self._source.model_copy(update={"dataset": path}), split)

    def _streamed(self, split: str) -> Path:
        """The file that keeps the texts of a streamed split."""
        source = self._source
        key = json.dumps([source.dataset, source.subset, source.revision, split, source.text_field])
        return self._folder / f"stream-{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl.gz"


def _documents(found: Iterator[Document | DataError]) -> Iterator[Document]:
    """The documents; raises DataError after the last one if there were faults."""
    faults = LeftOut()
    for each in found:
        if isinstance(each, Document):
            yield each
        else:
            faults.add_fault(str(each))
    if faults.unreadable:
        raise DataError(faults.listed("\n  "))


def _unbroken(documents: Iterator[Document], name: str) -> Iterator[Document]:
    """The documents of a stream; raises DataError if it breaks off."""
    try:
        yield from documents
    except MoeportError:
        raise
    except Exception as error:  # of the network, of file systems and of a dozen formats
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{name}: reading the stream was interrupted ({reason}); start again, which begins at the first row, or "
            "read the dataset without data.source.streaming"
        ) from error


def row_documents(rows: Any, text_field: str, name: str) -> Iterator[Document | DataError]:
    """One document per row, named `name:row`, counted from 1, or a fault for a row whose value is no string.

    Args:
        rows: a `datasets` dataset, either map-style or iterable.
        text_field: the column that holds the text.
        name: where the rows come from.

    Raises:
        DataError: the column does not exist.
    """
    columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them beforehand
    if columns and text_field not in columns:
        raise no_column(columns, text_field, name)
    number = 0
    for batch in rows.select_columns([text_field]).iter(batch_size=1000):
        for value in batch[text_field]:
            number += 1
            where = f"{name}:{number}"
            try:
                yield Document(where, checked_text(value, text_field, where))
            except DataError as error:
                yield error


def _load(source: HuggingFaceSource, split: str) -> Any:
    datasets = import_datasets()
    streaming = {"streaming": True} if source.streaming else {}
    is_folder = source.dataset.startswith((".", "/"))
    if is_folder and not os.path.isdir(source.dataset):
        raise DataError(f"data.source.dataset: there is no folder {source.dataset}")
    try:
        return datasets.load_dataset(source.dataset, source.subset, split=split, revision=source.revision, **streaming)
    except ConnectionError as error:
        raise DataError(
            f"data.source.dataset: {source.dataset!r} is not in the local cache and the Hugging Face hub cannot be "
            "reached; copy the cache of a machine that has it and point HF_HOME there, or use source `files` with "
            "downloaded .parquet or .jsonl files"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"data.source.dataset: the Hugging Face hub has no dataset {source.dataset!r} that you may read; "
            "check the name (owner/dataset) and, if it is private or gated, run `hf auth login`"
        ) from error
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"data.source: cannot load {source.dataset!r}, subset {source.subset!r}, split {split!r}: {reason}"
        ) from error
