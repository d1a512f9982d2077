"""Files in the safetensors format, read and written a block at a time: no tensor is ever held whole.

A file is the length of its header in 8 bytes, the header as JSON, and the bytes of the tensors without gaps, row by
row, little-endian (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.errors import DataError
from moeport.reading import open_file

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes of an element of each type, by its name in the format."""
NUMPY_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Of the types that numpy has, its name by that in the format."""
CODES = {name: code for code, name in NUMPY_TYPES.items()}
BLOCK_BYTES = 2**20
"""Most bytes that are read at once."""
_MAX_HEADER = 100 * 2**20
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    offset: int
    """Where its first byte is in the file."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def blocks(self, start: int = 0, count: int | None = None) -> Iterator[bytes]:
        """The bytes of `count` elements from `start` on, in blocks of whole elements.

        Raises DataError if they cannot be read.
        """
        item = ITEM_BYTES[self.dtype]
        left = item * (self.size - start if count is None else count)
        try:
            with open_file(self.file) as file:
                file.seek(self.offset + item * start)
                while left:
                    block = file.read(min(left, BLOCK_BYTES))
                    if len(block) < min(left, BLOCK_BYTES):
                        raise DataError(f"{self.file}: ends within {self.name}; fetch or convert it again")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes | memoryview]]
    """Gives its bytes in order."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def read_head(file: Path) -> bytes:
    """What comes before the tensors of a file. Raises DataError if it is no safetensors file."""
    try:
        with open_file(file) as stream:
            total = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            if (head + stream.read(15)).startswith(_LFS_POINTER):
                raise DataError(f"{file}: is a pointer of Git LFS, not the file itself; run git lfs pull")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER
            if length > min(_MAX_HEADER, total - 8):
                raise DataError(f"{file}: is not a safetensors file, or is cut off")
            stream.seek(8)
            return head + stream.read(length)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises DataError if it is no safetensors file, has a name twice, or has bytes that belong to no tensor.
    """
    head = read_head(file)
    try:
        entries = json.loads(head[8:], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: has no valid header of safetensors ({error})") from error
    if not isinstance(entries, dict):
        raise DataError(f"{file}: has no valid header of safetensors")
    entries.pop("__metadata__", None)
    return _checked(file, entries, len(head), file.stat().st_size)


def write_tensors(
    file: Path,
    tensors: Sequence[NewTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in the order in which they are given, each block by block.

    Raises OSError if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    with file.open("wb") as stream:
        stream.write(head)
        for tensor in tensors:
            before = stream.tell()
            for block in tensor.blocks():
                stream.write(block)
            written = stream.tell() - before
            if written != tensor.num_bytes:
                raise AssertionError(f"{tensor.name}: {written} bytes of {tensor.num_bytes}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if a name is in it twice, of which Python would drop one."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} occurs twice")
        found[name] = value
    return found


def _checked(file: Path, entries: dict[str, Any], data: int, total: int) -> dict[str, StoredTensor]:
    """The tensors of a header, which must fill the file from `data` to `total` without gaps."""
    found: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise DataError(f"{file}: the header describes {name} in a way that safetensors does not have")
        if entry["dtype"] not in ITEM_BYTES:
            raise DataError(f"{file}: {name} has the type {entry['dtype']}; expected F64, F32, F16 or BF16")
        begin, end = entry["data_offsets"]
        found[name] = tensor = StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), data + begin)
        if end - begin != ITEM_BYTES[tensor.dtype] * tensor.size:
            raise DataError(f"{file}: {name} has {end - begin} bytes, which do not fit its shape {tensor.shape}")
        ranges.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(ranges):
        if begin != place:
            raise DataError(f"{file}: the bytes of {name} begin at {begin}, expected {place}; fetch the file again")
        place = end
    if data + place != total:
        raise DataError(f"{file}: has {total} bytes, but its tensors end at {data + place}: it is cut off or damaged")
    return found


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_counts(entry.get("shape"))
        and _are_counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
