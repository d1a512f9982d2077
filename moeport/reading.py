"""How files that users name are opened: only regular ones, in bounded memory, with one sentence where that fails."""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
"""Greatest size of a file that is read as a whole, such as a config, a manifest or a tokenizer.json. The largest
tokenizer.json in use has half of it."""
_KINDS = (
    (stat.S_ISFIFO, "it is a named pipe"),
    (stat.S_ISSOCK, "it is a socket"),
    (stat.S_ISCHR, "it is a device"),
    (stat.S_ISBLK, "it is a device"),
)


def open_file(path: Path | str) -> BufferedReader:
    """Open a regular file for reading; never waits for another process.

    Pipes without a name, as the shell makes for `<(command)`, are opened too.

    Raises:
        OSError: it cannot be opened, or is a folder, a named pipe, a socket or a device. `strerror` says so.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path))):
            kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "it is no regular file")
            raise OSError(errno.EINVAL, f"{kind}; expected a regular file", str(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """The contents of a regular file.

    Args:
        path: the file.
        limit: greatest number of bytes.

    Raises:
        OSError: it cannot be read, is no regular file or is larger. `strerror` says so.
    """
    with open_file(path) as file:
        data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if data is None or len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit / 2**20:.0f} MiB, so it is something else", str(path))
    return data


def read_text(path: Path | str, limit: int = MAX_BYTES) -> str:
    """The contents of a regular file of UTF-8.

    Raises:
        OSError: see `read_bytes`.
        ValueError: it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is malformed, nested too deeply or has a number of thousands of digits; the message is one line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError as error:  # Python refuses to parse integers with thousands of digits
        raise ValueError("JSON with a number of thousands of digits") from error


def read_json(path: Path | str, limit: int = MAX_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: see `read_bytes`.
        ValueError: see `parse_json`.
    """
    return parse_json(read_bytes(path, limit))
