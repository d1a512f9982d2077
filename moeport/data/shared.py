"""Which texts are on both sides of a split, found in bounded memory."""

from __future__ import annotations

import base64
import hashlib
import zlib
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType

import numpy as np

PARTS = 64
"""Hashes are compared part by part, so this is how many times less memory than all hashes the comparison needs."""
MEMORY_PER_PART = 2**16
"""Bytes of a part that are held before it becomes a file."""
_RECORD = np.dtype([("digest", "S16"), ("ordinal", "<u8")])


def text_digest(data: bytes) -> bytes:
    """The hash by which texts are compared, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Marks:
    """A set of ordinals, one bit per document.

    Args:
        size: ordinals are below it.
    """

    def __init__(self, size: int):
        self._bits = np.zeros(-(-size // 8), np.uint8)
        self.count = 0
        """Number of ordinals in the set."""

    def add(self, ordinals: np.ndarray) -> None:
        """Add ordinals that are not in the set."""
        np.bitwise_or.at(self._bits, ordinals // 8, (1 << (ordinals % 8)).astype(np.uint8))
        self.count += len(ordinals)

    def packed(self) -> str:
        """The set as text."""
        return base64.b85encode(zlib.compress(self._bits.tobytes())).decode()

    @classmethod
    def unpacked(cls, text: str) -> Marks:
        """The set that `packed` has written."""
        bits = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
        marks = cls(8 * len(bits))
        marks.add(np.flatnonzero(np.unpackbits(bits, bitorder="little")))
        return marks

    def __contains__(self, ordinal: int) -> bool:
        return bool(self._bits[ordinal >> 3] >> (ordinal & 7) & 1)


class TextHashes:
    """Hashes of the texts of two sides, in temporary files; a context manager.

    Args:
        folder: where the files are made if there are many texts; None: where the system puts temporary files.
    """

    def __init__(self, folder: Path | None):
        self._sizes = [0, 0]
        where = None if folder is None else str(folder)
        self._parts = [
            [SpooledTemporaryFile(MEMORY_PER_PART, dir=where) for _ in range(PARTS)]  # noqa: SIM115 (closed on exit)
            for _ in range(2)
        ]

    def __enter__(self) -> TextHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (*self._parts[0], *self._parts[1]):
            part.close()

    def add(self, side: int, digest: bytes) -> None:
        """Add the next text of a side, 0 or 1, by its `text_digest`."""
        self._parts[side][digest[0] % PARTS].write(digest + self._sizes[side].to_bytes(8, "little"))
        self._sizes[side] += 1

    def shared(self, side: int) -> Marks:
        """The texts of a side, by their place among its texts, that the other side has too."""
        marks = Marks(self._sizes[side])
        for own, others in zip(self._parts[side], self._parts[1 - side], strict=True):
            found, other = _records(own), _records(others)
            marks.add(found["ordinal"][np.isin(found["digest"], other["digest"])].astype(np.int64))
        return marks


def _records(file: SpooledTemporaryFile[bytes]) -> np.ndarray:
    file.seek(0)
    return np.frombuffer(file.read(), _RECORD)
