"""Standard output and standard error that may be closed at any time: by `| head`, by a terminal that goes away."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moeport.errors import WriteError
from moeport.files import write_error

PIPE_CLOSED = 141
"""Exit code of a command whose reader has gone, as of one that SIGPIPE ends."""
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
"""Errors of a stream that nobody reads any more; EIO is that of a terminal."""


@contextmanager
def lasting_streams(goes_on: bool) -> Iterator[None]:
    """In the block, writing to a standard stream does not fail because nobody reads it.

    Args:
        goes_on: whether the command is worth finishing without an output, as training is. Otherwise it ends quietly
            where its output is closed, with exit code 141, and raises WriteError where the disk is full.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, goes_on), _lasting(sys.stderr, True)
    try:
        yield
    finally:
        with suppress(OSError, WriteError, SystemExit):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


class _Lasting(io.RawIOBase):
    """Writes to a descriptor for as long as that works."""

    def __init__(self, descriptor: int, name: str, goes_on: bool):
        self._descriptor, self._name, self._goes_on = descriptor, name, goes_on
        self._is_gone = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self._is_gone:
            return len(data)
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            self._fail(error)
        return len(data)

    def _fail(self, error: OSError) -> None:
        self._is_gone = True
        if self._name == "standard output" and self._goes_on:
            sys.stderr.write(f"{self._name} is closed ({error.strerror}); the command goes on without it\n")
            sys.stderr.flush()
        if self._goes_on:
            return
        if error.errno in GONE:
            raise SystemExit(PIPE_CLOSED)
        raise write_error(Path(self._name), error) or error


def _lasting(stream: Any, goes_on: bool) -> Any:
    """A stream like this one that lasts; the stream itself if it is no file, as in tests."""
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):
        return stream
    stream.flush()
    name = "standard output" if descriptor == 1 else "standard error"
    raw = _Lasting(descriptor, name, goes_on)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_closed() -> None:
    """Open the null device in place of streams that were closed, or the next file would take their number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            stream = os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False, encoding="utf-8")
            setattr(sys, name, stream)
