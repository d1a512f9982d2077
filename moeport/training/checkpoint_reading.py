"""The arrays of a checkpoint, read a part at a time, by any number of processes, whoever wrote them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from typing_extensions import override

from moeport.core.parameters import is_expert
from moeport.core.weights import Box, Weights
from moeport.errors import CheckpointError, DataError
from moeport.reading import open_file
from moeport.training.checkpoint_index import Arrays, Part, StoredArray
from moeport.training.tensor_file import NUMPY_TYPES, StoredTensor, read_header

USE_ANOTHER = "use another checkpoint"


class StoredWeights(Weights):
    """Arrays that lie in the files of a checkpoint. Every block that is read is held against its checksum.

    Args:
        arrays: by name.
    """

    def __init__(self, arrays: Arrays):
        self._arrays = arrays
        self._headers: dict[Path, Mapping[str, StoredTensor]] = {}

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    @override
    def dtype(self, name: str) -> str:
        return NUMPY_TYPES[self._arrays[name].code]

    @property
    @override
    def names(self) -> Collection[str]:
        return self._arrays

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        """See `Weights`. Raises CheckpointError, which names the array, and the expert, that is damaged."""
        array = self._arrays[name]
        values = np.empty(box.shape, self.dtype(name))
        for part in array.parts:
            if wanted := part.box.intersection(box):
                for block, found in self._read(array, part, wanted):
                    if common := block.intersection(wanted):
                        values[common.within(box).slices] = found[common.within(block).slices]
        return values

    def blocks(self, name: str) -> Iterator[tuple[Box, np.ndarray]]:
        """A whole array, block by block."""
        array = self._arrays[name]
        for part in array.parts:
            yield from self._read(array, part, part.box)

    def _read(self, array: StoredArray, part: Part, box: Box) -> Iterator[tuple[Box, np.ndarray]]:
        """The blocks of a part that have entries in `box`, and their contents."""
        try:
            place, item = self._place(array, part), np.dtype(self.dtype(array.name))
            with open_file(part.file) as file:
                for number in part.touched(box):
                    block = part.blocks[number]
                    if block.intersection(box) is None:
                        continue
                    file.seek(place + item.itemsize * part.offsets[number])
                    data = file.read(item.itemsize * block.size)
                    if len(data) < item.itemsize * block.size:
                        raise CheckpointError(f"{part.file}: ends within {array.name}; {USE_ANOTHER}")
                    if part.crcs is not None and zlib.crc32(data) != part.crcs[number]:
                        raise CheckpointError(
                            f"{part.file}: {_label(array.name, block)}: contents do not match their checksum; "
                            f"{USE_ANOTHER}"
                        )
                    yield block, np.frombuffer(data, item.newbyteorder("<")).reshape(block.shape)
        except OSError as error:
            raise CheckpointError(f"{part.file}: cannot be read: {error.strerror}; {USE_ANOTHER}") from error

    def _place(self, array: StoredArray, part: Part) -> int:
        """Where the first byte of a part is in its file, whose header must be what the index says."""
        if part.file not in self._headers:
            self._headers[part.file] = header_of(part.file)
        entry = self._headers[part.file].get(part.key)
        if entry is None:
            raise CheckpointError(f"{part.file}: has no {part.key}, which the index lists; {USE_ANOTHER}")
        if (entry.dtype, entry.shape) != (array.code, part.box.shape):
            raise CheckpointError(
                f"{part.file}: {part.key} is {entry.dtype} of shape {entry.shape}, but {array.code} of shape "
                f"{part.box.shape} in the index; {USE_ANOTHER}"
            )
        if part.crcs is not None and len(part.crcs) != len(part.blocks):
            raise CheckpointError(
                f"{part.file}: {part.key}: the index has {len(part.crcs)} checksums of its {len(part.blocks)} blocks; "
                f"{USE_ANOTHER}"
            )
        return entry.offset


def header_of(file: Path) -> Mapping[str, StoredTensor]:
    """The entries of a file of a checkpoint. Raises CheckpointError unless it is a safetensors file."""
    try:
        return read_header(file)
    except DataError as error:
        raise CheckpointError(f"{error}; {USE_ANOTHER}") from error


def undivided(file: Path) -> Arrays:
    """The arrays of a file of format version 1 or 2, which has each of them whole, and no checksum of any."""
    found: Arrays = {}
    for name, entry in header_of(file).items():
        if entry.dtype not in NUMPY_TYPES:
            raise CheckpointError(f"{file}: {name} has the type {entry.dtype}, which numpy lacks; {USE_ANOTHER}")
        box = Box.whole(entry.shape)
        found[name] = StoredArray(name, entry.dtype, entry.shape, [Part(file, name, name, box, None)])
    return found


def _label(name: str, block: Box) -> str:
    return f"{name}, expert {block.start[0]}" if is_expert(name) and block.start else name
