"""Ids of documents in files and streams: one JSON object per document, 32-bit numbers, or numbers in plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moeport.errors import DataError
from moeport.reading import open_file

BLOCK = 2**20
"""Bytes that are read at a time."""
Blocks = Iterable[np.ndarray]
"""The ids of a document, in parts."""
Write = Callable[[BinaryIO, str, Blocks], None]
"""Writes a document with its name to a stream."""
Documents = Iterator[tuple[str, Blocks]]
"""Names and ids."""


def write_plain(stream: BinaryIO, name: str, blocks: Blocks) -> None:
    """A line of numbers."""
    before = ""
    for block in blocks:
        stream.write((before + " ".join(map(str, block.tolist()))).encode())
        before = " "
    stream.write(b"\n")


def write_json(stream: BinaryIO, name: str, blocks: Blocks) -> None:
    """A line with an object: `name` and `ids`."""
    stream.write(f'{{"name": {json.dumps(name)}, "ids": ['.encode())
    before = ""
    for block in blocks:
        stream.write((before + ", ".join(map(str, block.tolist()))).encode())
        before = ", "
    stream.write(b"]}\n")


def binary_writer(separator: int | None) -> Write:
    """Writes ids as little-endian uint32, and after each document the separator."""

    def write(stream: BinaryIO, name: str, blocks: Blocks) -> None:
        for block in blocks:
            stream.write(block.astype("<u4").tobytes())
        if separator is not None:
            stream.write(np.array([separator], "<u4").tobytes())

    return write


def read_ids(path: Path) -> Documents:
    """The documents of a file: .jsonl and .bin as they are written here, anything else as numbers in plain text.

    Memory depends on the longest line of a .jsonl file only.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        with open_file(path) as stream:
            if path.suffix == ".jsonl":
                yield from _json_lines(stream, path)
            else:
                yield str(path), (_binary if path.suffix == ".bin" else read_plain)(stream, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the ids: {error.strerror}") from error


def read_plain(stream: BinaryIO, name: str) -> Blocks:
    """The numbers of a text, between white space.

    Raises:
        DataError: something is no number.
    """
    rest = b""
    while data := stream.read(BLOCK):
        *words, rest = (rest + data + b"|").split()  # the mark keeps the last word apart from white space
        rest = rest.removesuffix(b"|")
        yield _numbers(words, name)
    yield _numbers([rest] if rest else [], name)


def _numbers(words: list[bytes], name: str) -> np.ndarray:
    wrong = next((word for word in words if not word.isdigit()), None)
    if wrong is not None:
        raise DataError(f"{name}: {wrong[:40].decode(errors='replace')!r} is not an id; expected whole numbers from 0")
    return np.array([min(int(word), 2**62) for word in words], np.int64)


def _binary(stream: BinaryIO, name: str) -> Blocks:
    while data := stream.read(BLOCK):
        if len(data) % 4:
            raise DataError(f"{name}: its length is not a multiple of 4 bytes; expected ids of 32 bits each")
        yield np.frombuffer(data, "<u4").astype(np.int64)


def _json_lines(stream: BinaryIO, path: Path) -> Documents:
    for number, line in enumerate(stream, 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            ids = np.array(row["ids"], np.int64)
            name = str(row.get("name", where))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f'{where}: no row of ids ({type(error).__name__}); expected {{"name": "...", "ids": [1, 2]}}'
            ) from error
        if ids.ndim != 1 or (ids < 0).any():
            raise DataError(f"{where}: `ids` is not a list of whole numbers from 0")
        yield name, [ids]
