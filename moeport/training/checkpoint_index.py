"""The index of a checkpoint: which part of which array is where, with a checksum of every block of it.

Each rank that writes has an index, of its own files:

    {"files": {"model-00000-of-00002.safetensors": {"bytes": ..., "head_sha256": "..."}, ...},
     "model": {"layers.0.moe.experts.w_in": {"dtype": "F32", "shape": [8, 64, 32], "parts": [
         {"file": "model-00000-of-00002.safetensors", "key": "layers.0.moe.experts.w_in[0:4, 0:64, 0:32]",
          "start": [0, 0, 0], "shape": [4, 64, 32], "crc32": [...]}]}, ...},
     "optimizer": {...}}

A part is an entry of its file, under the array's name if it is the whole array. `crc32` has the CRC-32 of each of its
`blocks`, in order.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moeport.core.parameters import is_expert
from moeport.core.weights import Box, overlapping
from moeport.errors import CheckpointError
from moeport.training.tensor_file import NUMPY_TYPES

BLOCK_ENTRIES = 2**20
"""Most entries of a block."""
KINDS = ("model", "optimizer")
"""Of the arrays of a checkpoint: parameters with the routers' state, and the optimiser's state."""


def blocks(box: Box, by_row: bool) -> Iterator[Box]:
    """A part cut into blocks, each of which is one run of its entries, row by row.

    Args:
        box: the part.
        by_row: whether no block may hold more than one index of the first dimension, which is that of the experts.
    """
    by_row = by_row and box.shape[:1] > (1,)
    if box.size <= BLOCK_ENTRIES and not by_row:
        if box.size:
            yield box
        return
    dim = next(dim for dim, count in enumerate(box.shape) if count > 1)
    step = 1 if by_row else max(1, BLOCK_ENTRIES // math.prod(box.shape[dim + 1 :]))
    for first in range(0, box.shape[dim], step):
        count = min(step, box.shape[dim] - first)
        start = (*box.start[:dim], box.start[dim] + first, *box.start[dim + 1 :])
        yield from blocks(Box(start, (*box.shape[:dim], count, *box.shape[dim + 1 :])), by_row=False)


def key_of(name: str, whole: Sequence[int], box: Box) -> str:
    """Under which key a file holds a part of an array: its name, and the part unless it is the whole array."""
    if box == Box.whole(tuple(whole)):
        return name
    return f"{name}{shown(box)}"


def shown(box: Box) -> str:
    """A part as its ranges: [0:4, 0:64]."""
    return f"[{', '.join(f'{first}:{first + count}' for first, count in zip(box.start, box.shape, strict=True))}]"


@dataclass(frozen=True)
class Part:
    """A part of an array, which is one entry of a file."""

    file: Path
    name: str
    """Of the array."""
    key: str
    """Of the entry."""
    box: Box
    crcs: Sequence[int] | None
    """CRC-32 of the bytes of each block; None: of an older checkpoint, which has none."""

    @cached_property
    def blocks(self) -> list[Box]:
        """Its blocks, in the order of their bytes."""
        return list(blocks(self.box, is_expert(self.name)))

    @cached_property
    def offsets(self) -> list[int]:
        """For each block, the number of entries before it."""
        return [0, *np.cumsum([block.size for block in self.blocks]).tolist()][:-1]

    @cached_property
    def _rows(self) -> list[int]:
        return [block.start[0] for block in self.blocks]

    def touched(self, box: Box) -> range:
        """Numbers of the blocks among which are all that have entries in `box`."""
        if not self.box.shape:
            return range(len(self.blocks))
        first = bisect_right(self._rows, box.start[0]) - 1
        return range(
            bisect_left(self._rows, self._rows[max(first, 0)]), bisect_left(self._rows, box.start[0] + box.shape[0])
        )


@dataclass
class StoredArray:
    """An array of a checkpoint, and the parts that it is stored in."""

    name: str
    code: str
    """Its type, a key of NUMPY_TYPES."""
    shape: tuple[int, ...]
    parts: list[Part] = field(default_factory=list)

    def check_cover(self, where: Path) -> None:
        """Refuse parts that are not, all together, each entry exactly once. Raises CheckpointError."""
        for part in self.parts:
            fits = len(part.box.start) == len(part.box.shape) == len(self.shape) and all(
                start >= 0 and start + count <= size
                for start, count, size in zip(part.box.start, part.box.shape, self.shape, strict=True)
            )
            if not fits:
                raise CheckpointError(
                    f"{part.file}: {self.name}: {shown(part.box)} is not a part of an array of shape {self.shape}; "
                    "use another checkpoint"
                )
        parts = sorted(self.parts, key=lambda part: part.box.start)
        if found := overlapping([part.box for part in parts]):
            names = " and ".join(f"{shown(parts[i].box)} in {parts[i].file.name}" for i in found)
            raise CheckpointError(f"{where}: {self.name}: two parts overlap, {names}; use another checkpoint")
        entries = sum(part.box.size for part in self.parts)
        if entries != math.prod(self.shape):
            raise CheckpointError(
                f"{where}: {self.name}: its parts hold {entries:,} of its {math.prod(self.shape):,} entries; "
                "use another checkpoint"
            )


Arrays = dict[str, StoredArray]


def index_text(files: Mapping[str, Any], arrays: Mapping[str, Mapping[str, StoredArray]]) -> str:
    """The index of the files of one rank.

    Args:
        files: the size of each, and the SHA-256 of what comes before its arrays.
        arrays: for each of KINDS, the arrays by name, with the parts that are in these files.
    """
    values = {kind: {name: _entry(array) for name, array in arrays[kind].items()} for kind in KINDS}
    return json.dumps({"files": files, **values}, separators=(",", ":")) + "\n"


def _entry(array: StoredArray) -> dict[str, Any]:
    parts = [
        {
            "file": part.file.name,
            "key": part.key,
            "start": part.box.start,
            "shape": part.box.shape,
            "crc32": part.crcs,
        }
        for part in array.parts
    ]
    return {"dtype": array.code, "shape": array.shape, "parts": parts}


def read_arrays(path: Path, indexes: Mapping[str, Any]) -> dict[str, Arrays]:
    """The arrays that the indexes of a checkpoint describe, by kind and name, in the order of the indexes.

    Args:
        path: the folder of the checkpoint.
        indexes: by file name; as JSON.

    Raises CheckpointError, which names the array, unless every one is there completely and once.
    """
    found: dict[str, Arrays] = {kind: {} for kind in KINDS}
    for file, index in indexes.items():
        for kind in KINDS:
            try:
                for name, entry in index[kind].items():
                    _add(found[kind], path, file, name, entry)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{path / file}: does not describe parts as moeport writes them ({error!r}); use another checkpoint"
                ) from error
    for arrays in found.values():
        for array in arrays.values():
            array.check_cover(path)
    return found


def _add(arrays: Arrays, path: Path, file: str, name: str, entry: Any) -> None:
    code, shape = entry["dtype"], tuple(map(int, entry["shape"]))
    if code not in NUMPY_TYPES:
        raise ValueError(f"data type {code}")
    array = arrays.setdefault(name, StoredArray(name, code, shape))
    if (array.code, array.shape) != (code, shape):
        raise CheckpointError(
            f"{path / file}: {name} is {code} of shape {shape}, but {array.code} of shape {array.shape} in another "
            "index; use another checkpoint"
        )
    own = {f"{kind}{file.removeprefix('index').removesuffix('.json')}.safetensors" for kind in KINDS}
    for part in entry["parts"]:
        if part["file"] not in own:
            raise ValueError(f"file {part['file']}")
        box = Box(tuple(map(int, part["start"])), tuple(map(int, part["shape"])))
        array.parts.append(Part(path / part["file"], name, str(part["key"]), box, list(map(int, part["crc32"]))))
