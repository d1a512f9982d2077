"""Compressed files as streams of bytes, in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO

from moeport.data.documents import MissingPackageError
from moeport.optional import load
from moeport.reading import open_file

MAX_RATIO, FREE_BYTES = 200, 64 * 2**20
"""A file that unpacks to more than `FREE_BYTES` and `MAX_RATIO` times its size is no text, which shrinks 3 to 20
fold."""
STREAM_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises; those of zstd are turned into OSError."""


def open_stream(path: str) -> io.BufferedReader:
    """The unpacked bytes of a file.

    Raises:
        OSError: it cannot be opened or is no regular file.
        MissingPackageError: the package that unpacks it is not installed.
    """
    unpack = UNPACKERS.get(os.path.splitext(path)[1].lower())
    if unpack is None:
        return open_file(path)
    file = open_file(path)
    return io.BufferedReader(_Bounded(unpack(file), path, os.fstat(file.fileno()).st_size), 2**16)


class _Bounded(io.RawIOBase):
    """Stops unpacking at what can be no text."""

    def __init__(self, inner: Any, path: str, size: int):
        self._inner, self._path, self._size, self._read = inner, path, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except STREAM_ERRORS:
            raise
        except Exception as error:  # those of zstd have a class of their own
            raise OSError(f"damaged: {error}") from error
        self._read += len(data)
        if self._read > max(FREE_BYTES, MAX_RATIO * self._size):
            raise OSError(f"unpacks to more than {MAX_RATIO} times its size, so it is not text")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _zstd(file: BinaryIO) -> Any:
    """A reader by Python 3.14's module, or else by the package."""
    try:
        return import_module("compression.zstd").ZstdFile(file)
    except ImportError:
        pass
    zstandard = load("zstandard", "reading a .zst file", "data", MissingPackageError)
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


UNPACKERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
"""By suffix, what unpacks a file."""
