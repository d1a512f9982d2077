"""A file that grows, read piece by piece."""

from __future__ import annotations

import os
from pathlib import Path

from moeport.reading import open_file

MOST_BYTES = 16 * 2**20
"""Bytes that are read at once."""
COMPARED = 256
"""Bytes by which a file is recognised: the end of the last line that was read."""


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, also where links lead."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


class Tail:
    """The lines of a file in a folder, as far as they are complete; the file may grow, or be replaced by another one.

    Args:
        folder: the folder; what links lead out of it is not read.
        name: the file in it; it need not exist.
        most: bytes that are read at once; default MOST_BYTES.
    """

    def __init__(self, folder: Path, name: str, most: int | None = None):
        self.folder, self.path, self._most = folder, folder / name, most or MOST_BYTES
        self._file: tuple[int, int] | None = None
        self._place = 0
        self._before = b""
        """The last bytes that were read, which tell this file from one that has grown in its place."""
        self.is_behind = False
        """Whether more than could be read at once was waiting."""

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the file has begun anew since the last call, and its new lines.

        Raises OSError if it cannot be read, as one that a link leads to outside the folder.
        """
        self.is_behind = False
        try:
            if not is_inside(self.path, self.folder):
                raise OSError(f"{self.path}: is a link that leads out of the folder")
            with open_file(self.path) as file:
                status = os.fstat(file.fileno())
                found = status.st_dev, status.st_ino
                file.seek(self._place - len(self._before))
                is_new = found != self._file or file.read(len(self._before)) != self._before
                place = 0 if is_new else self._place
                file.seek(place)
                data = file.read(self._most)
        except FileNotFoundError:
            is_new, self._file, self._place, self._before = self._file is not None, None, 0, b""
            return is_new, []
        end = data.rfind(b"\n") + 1
        if not end and len(data) == self._most:
            raise OSError(f"{self.path}: has a line of more than {self._most:,} bytes")
        self._file, self._place = found, place + end
        self._before = data[max(0, end - COMPARED) : end] or (b"" if is_new else self._before)
        self.is_behind = len(data) == self._most
        return is_new, data[:end].splitlines()
