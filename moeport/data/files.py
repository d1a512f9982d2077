"""Documents in local files: one per text file, or one per row of .jsonl and .parquet files."""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from io import BufferedReader
from itertools import count

from moeport.config.data import FilesSource
from moeport.data.documents import Document, MissingPackageError, checked_text, no_column
from moeport.data.huggingface import import_datasets, row_documents
from moeport.data.left_out import LeftOut
from moeport.data.streams import STREAM_ERRORS, UNPACKERS, open_stream
from moeport.errors import DataError
from moeport.reading import open_file

TEXT_SUFFIXES = (".txt", ".py", ".md", ".rst", ".html", ".htm")
MAX_DOCUMENT, MAX_LINE = 2**31, 2**27
"""Bytes of the longest text file and of the longest line; encoding them takes far more memory."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and the encodings that they announce; that of UTF-32 begins with that of UTF-16."""

Found = Iterator[Document | DataError]
"""Documents of a file, and the faults of rows that cannot be read."""


class FileReader:
    """Reads the files of a source.

    Args:
        source: says how they are read.
        root: the folder that is no part of the keys of documents; empty: there is none.
    """

    def __init__(self, source: FilesSource, root: str = ""):
        self._source, self._root = source, root
        self._other = {suffix.lower() for suffix in source.text_suffixes}
        self.kinds = ", ".join([*TEXT_SUFFIXES, *sorted(self._other), ".jsonl, .parquet"])
        """The kinds of files that can be read, for error messages."""

    def is_readable(self, path: str) -> bool:
        """Whether the suffix is that of a file that can be read."""
        return self._reader(path) is not None

    def read(self, paths: Iterable[str], left_out: LeftOut) -> Iterator[Document]:
        """The documents of the files in order. Rows are named `path:row` and lines `path:line`, counted from 1.

        Args:
            paths: of files.
            left_out: what cannot be read is added to it.

        Raises:
            MissingPackageError: a package that is needed is not installed.
        """
        for path in paths:
            below = _below(path, self._root)
            for found in self._documents(path):
                if isinstance(found, Document):
                    yield found._replace(below=below and below + found.name[len(path) :])
                else:
                    left_out.add_fault(str(found))

    def refuse_faults(self, left_out: LeftOut) -> None:
        """Refuse a source with files or rows that cannot be read, unless it skips them.

        Raises:
            DataError: lists them.
        """
        if left_out.unreadable == 1 and self._source.bad_files == "refuse":
            raise DataError(left_out.faults[0])
        if left_out.unreadable and self._source.bad_files == "refuse":
            listed = left_out.listed("\n  ")
            raise DataError(
                f"data.source: {left_out.unreadable:,} files or rows cannot be read; fix them, leave them out with "
                f"data.source.exclude, or skip them with data.source.bad_files:\n  {listed}"
            )

    def _documents(self, path: str) -> Found:
        reader = self._reader(path)
        assert reader is not None
        try:
            yield from reader(path)
        except MissingPackageError:
            raise
        except DataError as error:
            yield error
        except STREAM_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            yield DataError(f"{path}: cannot read the file: {reason}")

    def _reader(self, path: str) -> Callable[[str], Found] | None:
        stem, suffix = os.path.splitext(path.lower())
        if suffix in UNPACKERS:
            inner = os.path.splitext(stem)[1]
            return self._unpacked_reader(inner) or (self._read_text if suffix in self._other else None)
        return self._read_parquet if suffix == ".parquet" else self._unpacked_reader(suffix)

    def _unpacked_reader(self, suffix: str) -> Callable[[str], Found] | None:
        if suffix == ".jsonl":
            return self._read_json_lines
        is_text = suffix in TEXT_SUFFIXES or suffix in self._other or ("*" in self._other and suffix != ".parquet")
        return self._read_text if is_text else None

    def _read_text(self, path: str) -> Found:
        with open_stream(path) as stream:
            encoding = self._encoding(stream)
            data = stream.read(MAX_DOCUMENT + 1) if os.path.getsize(path) <= MAX_DOCUMENT else None
        if data is None or len(data) > MAX_DOCUMENT:
            raise DataError(f"{path}: longer than {MAX_DOCUMENT / 2**30:.0f} GiB; split it into several documents")
        yield Document(path, self._decode(data, encoding, path, 0))

    def _read_json_lines(self, path: str) -> Found:
        """One document per line. `datasets` is not used here because it parses texts that look like dates."""
        with open_stream(path) as stream:
            for where, line in self._lines(stream, path):
                try:
                    if isinstance(line, DataError):
                        raise line
                    text = line.removeprefix("\ufeff").rstrip()
                    if text:
                        yield Document(where, _json_text(text, self._source.text_field, where))
                except DataError as error:
                    yield error

    def _lines(self, stream: BufferedReader, path: str) -> Iterator[tuple[str, str | DataError]]:
        """The lines of a file with their places. Those that are not in its encoding are faults of their own.

        Files in encodings in which a line does not end in the byte 10 are read as a whole.
        """
        encoding = self._encoding(stream)
        if "\n".encode(encoding.removesuffix("-sig")) != b"\n":
            data = stream.read(MAX_LINE + 1)
            if len(data) > MAX_LINE:
                raise DataError(
                    f"{path}: longer than {MAX_LINE / 2**20:.0f} MiB in {encoding}, which is read as a whole; "
                    "convert it to UTF-8, or split it"
                )
            whole = self._decode(data, encoding, path, 0)
            yield from ((f"{path}:{number}", line) for number, line in enumerate(whole.split("\n"), 1))
            return
        offset = 0
        for number in count(1):
            where = f"{path}:{number}"
            line = stream.readline(MAX_LINE)
            if len(line) == MAX_LINE:
                raise DataError(f"{where}: a line longer than {MAX_LINE / 2**20:.0f} MiB; split it into several rows")
            if not line:
                return
            try:
                yield where, self._decode(line, encoding, where, offset)
            except DataError as error:
                yield where, error
            offset += len(line)

    def _read_parquet(self, path: str) -> Found:
        open_file(path).close()
        datasets = import_datasets()
        pattern = glob.escape(os.path.abspath(path))
        try:
            if not import_module("pyarrow.parquet").read_metadata(path).num_rows:
                return
            rows = datasets.load_dataset("parquet", data_files=[pattern], split="train", streaming=True)
            yield from row_documents(rows, self._source.text_field, path)
        except (OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{path}: cannot read as parquet: {error}") from error

    def _encoding(self, stream: BufferedReader) -> str:
        """The encoding of the source, or the one that a byte order mark announces instead of UTF-8."""
        given = codecs.lookup(self._source.encoding).name
        start = stream.peek(4)[:4]
        marked = (encoding for mark, encoding in _MARKS if start.startswith(mark))
        return next(marked, given) if given == "utf-8" else given

    def _decode(self, data: bytes, encoding: str, where: str, offset: int) -> str:
        try:
            text = data.decode(encoding)
            if not encoding.startswith("utf-8"):
                text.encode()  # some encodings can spell half of a surrogate pair
        except UnicodeError as error:
            place = f" at byte {offset + error.start}" if isinstance(error, UnicodeDecodeError) else ""
            name = "UTF-8" if encoding.startswith("utf-8") else encoding
            raise DataError(
                f"{where}: not {name}{place}; convert the file to UTF-8, or set data.source.encoding"
            ) from error
        return text


def _below(path: str, root: str) -> str:
    """The path without the folder that it starts from; empty if there is none, or the path is not in it."""
    found = os.path.relpath(path, root) if root else ""
    return "" if found.split(os.sep)[0] == os.pardir else found


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # Python refuses to parse integers with thousands of digits
        raise DataError(f"{where}: malformed JSON: a number of thousands of digits") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with the key {text_field!r}; got {type(row).__name__}")
    if text_field not in row:
        raise no_column(list(row), text_field, where)
    text = checked_text(row[text_field], text_field, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: column {text_field!r} holds half of a surrogate pair; repair the JSON") from error
    return text
