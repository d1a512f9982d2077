"""How files that users name are opened: only regular ones, in bounded memory, with one sentence where that fails."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
"""Greatest size of a file that is read as a whole, such as a config, a manifest or a tokenizer.json. The largest
tokenizer.json in use has half of it."""
_BLOCK = 2**20
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
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
        if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path))):
            kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "it is no regular file")
            raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
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
    data = bytearray()
    with open_file(path) as file:
        is_larger = os.fstat(file.fileno()).st_size > limit
        while not is_larger and (block := file.read(_BLOCK)):  # read(limit) would allocate the whole limit first
            data += block
            is_larger = len(data) > limit
    if is_larger:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return bytes(data)


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


def read_lines(path: Path | str, limit: int = MAX_BYTES) -> Iterator[str]:
    """The lines of a regular file with their ends; what is not UTF-8 becomes U+FFFD.

    Args:
        path: the file.
        limit: greatest number of bytes of a line.

    Raises:
        OSError: the file cannot be read, is no regular file or has a longer line. `strerror` says so.
    """
    with open_file(path) as file:
        while line := file.readline(limit + 1):
            if len(line) > limit:
                raise OSError(errno.EFBIG, f"it has a line longer than {limit:,} bytes", str(path))
            yield line.decode(errors="replace")


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


def check_types(value: Any, expected: Any, where: str = "") -> None:
    """Check that a value from a JSON file has the form that its reader relies on.

    Args:
        value: the value.
        expected: a type or several; `[form]` for a list; `{key: form}` for an object with at least these keys, in
            which a `?` at the end of a key lets it be missing; `{...: form}` for an object with any keys.
        where: path of the value.

    Raises:
        ValueError: one line such as `tensors[3].shape is a string, expected a list`.
    """
    if isinstance(expected, list):
        _check_type(value, (list,), where)
        for number, item in enumerate(value):
            check_types(item, expected[0], f"{where}[{number}]")
    elif isinstance(expected, dict):
        _check_type(value, (dict,), where)
        for key, form in expected.items():
            if key is ...:
                for name, child in value.items():
                    check_types(child, form, f"{where}.{name}".lstrip("."))
            elif key.removesuffix("?") in value:
                name = key.removesuffix("?")
                check_types(value[name], form, f"{where}.{name}".lstrip("."))
            elif not key.endswith("?"):
                raise ValueError(f"{where or 'the object'} has no {key}")
    else:
        _check_type(value, expected if isinstance(expected, tuple) else (expected,), where)


NUMBER = (int, float)
"""The form of a number, for `check_types`."""
_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _check_type(value: Any, types: tuple[type, ...], where: str) -> None:
    if type(value) not in types:
        wanted = " or ".join(_NAMES[each] for each in types if not (each is int and float in types))
        raise ValueError(f"{where or 'it'} is {_NAMES[type(value)]}, expected {wanted}")
