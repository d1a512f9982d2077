"""Calls into the tokenizers library that neither hang nor crash, whatever the tokenizer.json asks of it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TypeVar

from moeport.errors import DataError

Result = TypeVar("Result")

BASE_SECONDS, SECONDS_PER_CHARACTER = 1.5, 1e-4
"""Processor time that a text may take to encode: a hundred times what a slow tokenizer needs. A pattern that backtracks
exceeds it within a few thousand characters."""


GAVE_UP = "the tokenizers library gave up ({}); fix the tokenizer.json, or use another tokenizer"
"""What is said of a call that failed; with the reason."""


def guarded(call: Callable[[], Result], characters: int, failure: str = GAVE_UP) -> Result:
    """The result of a call into the tokenizers library.

    It runs in a thread, so that Ctrl-C and signals are answered meanwhile. A thread that takes too long cannot be
    stopped; it ends with the process.

    Args:
        call: calls the library.
        characters: length of the texts it is given.
        failure: the message of a failure, with a place for the reason.

    Raises:
        DataError: the call failed, or used far more processor time than such texts take.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # a panic of Rust code is no Exception
            errors.append(error)

    allowed = BASE_SECONDS + SECONDS_PER_CHARACTER * characters
    with _without_panic_messages():
        thread = threading.Thread(target=work, daemon=True)
        started = time.process_time()
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if thread.is_alive() and time.process_time() - started > allowed:
                raise DataError(
                    f"the tokenizer took more than {allowed:.1f} s of processor time for {characters:,} characters; "
                    "a pattern in its tokenizer.json backtracks: simplify it, or use another tokenizer"
                )
    if errors:
        reason = " ".join(str(errors[0]).split())[:200]
        raise DataError(failure.format(reason)) from errors[0]
    return results[0]


_PANIC = re.compile(rb"\n?thread '[^\n]*panicked at .*", re.DOTALL)
_lock = threading.Lock()


@contextmanager
def _without_panic_messages() -> Iterator[None]:
    """Keeps the traces that Rust prints about panics out of standard error, and passes on whatever else it gets."""
    with _lock:
        try:
            sys.stderr.flush()
            saved = os.dup(2)
        except (OSError, ValueError, AttributeError):  # closed
            yield
            return
        with _memory_file() as caught:
            os.dup2(caught.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
                os.close(saved)
                caught.seek(0)
                rest = _PANIC.sub(b"", caught.read())
                if rest:
                    os.write(2, rest)


def _memory_file() -> IO[bytes]:
    """A file that needs no disk, which may be full, where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "r+b")
    return tempfile.TemporaryFile()
