"""Documents of Hugging Face datasets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from moeport.config.data import HuggingFaceSource
from moeport.data.documents import Document, MissingPackageError, checked_text, no_column
from moeport.data.left_out import LeftOut
from moeport.errors import DataError


def import_datasets() -> ModuleType:
    """The `datasets` package with its logging silenced, since failures raise errors.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            "parquet files and Hugging Face datasets need the package `datasets`: pip install 'moeport[data]'"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def read_split(source: HuggingFaceSource, split: str) -> list[Document]:
    """One document per row, named `dataset:split:row`, counted from 1.

    Raises:
        DataError: the dataset, the split or the column does not exist or cannot be read, or rows hold no text.
    """
    documents, faults = [], LeftOut()
    for found in row_documents(_load(source, split), source.text_field, f"{source.dataset}:{split}"):
        if isinstance(found, Document):
            documents.append(found)
        else:
            faults.add_fault(str(found))
    if faults.unreadable:
        raise DataError(faults.listed("\n  "))
    return documents


def row_documents(rows: Any, text_field: str, name: str) -> Iterator[Document | DataError]:
    """One document per row, named `name:row`, counted from 1, or a fault for a row whose value is no string.

    Args:
        rows: a `datasets` dataset, either map-style or iterable.
        text_field: the column that holds the text.
        name: where the rows come from.

    Raises:
        DataError: the column does not exist.
    """
    if text_field not in rows.column_names:
        raise no_column(rows.column_names, text_field, name)
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
    is_folder = source.dataset.startswith((".", "/"))
    if is_folder and not os.path.isdir(source.dataset):
        raise DataError(f"data.source.dataset: there is no folder {source.dataset}")
    try:
        return datasets.load_dataset(source.dataset, source.subset, split=split, revision=source.revision)
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
