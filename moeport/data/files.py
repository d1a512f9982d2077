"""Documents in local files: one per file (.txt, .py) or one per row (.jsonl, .parquet)."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moeport.data.documents import Document, checked_text
from moeport.data.huggingface import import_datasets, row_documents
from moeport.errors import DataError


def find_files(patterns: Sequence[str], option: str) -> list[str]:
    """The files that match the globs, sorted, without duplicates.

    Args:
        patterns: globs, in which `**` matches any number of folders and `~` is the home folder.
        option: the config key that holds the globs, for error messages.

    Raises:
        DataError: a glob matches no file, or matches a file of an unsupported kind.
    """
    found = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        paths = {os.path.normpath(path) for path in matches if not os.path.isdir(path)}
        if not paths:
            raise DataError(f"{option}: no file matches {pattern!r} (working directory {os.getcwd()})")
        found |= paths
    for path in sorted(found):
        if Path(path).suffix not in _READERS:
            raise DataError(
                f"{option}: cannot read {path}: expected {', '.join(_READERS)}; narrow the glob, "
                "such as data/**/*.txt, or convert the file"
            )
    return sorted(found)


def read_files(paths: Sequence[str], text_field: str) -> list[Document]:
    """The documents of the files in order. Rows are named `path:row` and lines `path:line`, counted from 1.

    Raises:
        DataError: a file cannot be read, is malformed or is not UTF-8, or a row has no text.
    """
    documents: list[Document] = []
    for path in paths:
        try:
            documents += _READERS[Path(path).suffix](path, text_field)
        except OSError as error:
            raise DataError(f"{path}: cannot read the file: {error.strerror or error}") from error
    return documents


def _read_text(path: str, text_field: str) -> Iterator[Document]:
    yield Document(path, _decode(Path(path).read_bytes(), path, 0))


def _read_json_lines(path: str, text_field: str) -> Iterator[Document]:
    """One document per line. `datasets` is not used here because it parses texts that look like dates."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _decode(line, where, offset).removeprefix("\ufeff").rstrip()
            offset += len(line)
            if text:
                yield Document(where, _json_text(text, text_field, where))


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with the key {text_field!r}; got {type(row).__name__}")
    if text_field not in row:
        raise DataError(f"{where}: no column {text_field!r}; columns: {', '.join(row)}; set data.source.text_field")
    text = checked_text(row[text_field], text_field, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: column {text_field!r} holds half of a surrogate pair; repair the JSON") from error
    return text


def _read_parquet(path: str, text_field: str) -> Iterator[Document]:
    datasets = import_datasets()
    pattern = glob.escape(os.path.abspath(path))
    try:
        rows = datasets.load_dataset("parquet", data_files=[pattern], split="train", streaming=True)
        yield from row_documents(rows, text_field, path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot read as parquet: {error}") from error


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {offset + error.start}; convert the file to UTF-8") from error


_READERS: dict[str, Callable[[str, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
