"""How the files of a checkpoint are written: each rank its own, and the first rank what makes them a checkpoint.

All ranks write into one folder with a temporary name. The index of a rank comes last, once its other files are on disk:
it is the sign that they are complete. The first rank waits for the indexes of all, writes meta.json, and gives the
folder its name. Ranks meet in files only, so that a thread can do all of it in the background.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moeport.core.parameters import is_expert
from moeport.core.weights import Box, Shard
from moeport.errors import WriteError
from moeport.files import LOOK_SECONDS, sync
from moeport.training.checkpoint_index import (
    KINDS,
    Arrays,
    Part,
    StoredArray,
    blocks,
    index_text,
    key_of,
    read_arrays,
)
from moeport.training.checkpoint_meta import (
    META_FILE,
    CheckpointMeta,
    array_file,
    file_entry,
    index_file,
    meta_text,
)
from moeport.training.tensor_file import CODES, ITEM_BYTES, NewTensor, write_tensors

FAILED = "failed-"
"""Begins the name of a file in which a rank says why it cannot write its part."""


@dataclass(frozen=True)
class NewPart:
    """A part of an array that is to be written."""

    name: str
    code: str
    """Its type, as safetensors names it."""
    whole: tuple[int, ...]
    """Shape of the array."""
    box: Box
    chunks: Callable[[], Iterable[bytes | memoryview]]
    """Gives the bytes of the part in order, in pieces of any size."""


def part_of(shard: Shard) -> NewPart:
    """A shard, to be written from its array."""
    array = shard.array
    return NewPart(shard.name, CODES[array.dtype.name], shard.whole, shard.box, lambda: bytes_of(shard))


def whole_part(tensor: NewTensor) -> NewPart:
    """A whole array, given as a tensor to be written."""
    return NewPart(tensor.name, tensor.dtype, tensor.shape, Box.whole(tensor.shape), tensor.blocks)


def bytes_of(shard: Shard) -> Iterator[memoryview]:
    """The bytes of a shard, a block at a time, so that one which is not contiguous is never copied whole."""
    for block in blocks(shard.box, is_expert(shard.name)):
        values = shard.array[block.within(shard.box).slices]
        yield values.astype(values.dtype.newbyteorder("<"), order="C", copy=False).reshape(-1).view("u1").data


def write_rank(folder: Path, rank: int, ranks: int, *parts: Sequence[NewPart]) -> None:
    """Write the files of one rank, flush them to disk, and write its index, which says so.

    Args:
        folder: the temporary folder of the checkpoint.
        rank: this rank.
        ranks: how many write.
        *parts: for each of KINDS, what to write.

    Raises OSError if they cannot be written.
    """
    files: dict[str, Any] = {}
    arrays: dict[str, Arrays] = {}
    for kind, new in zip(KINDS, parts, strict=True):
        file = folder / array_file(kind, rank, ranks)
        files[file.name], arrays[kind] = _write_file(file, new)
    index = folder / index_file(rank, ranks)
    hidden = index.with_name(f".{index.name}")
    hidden.write_text(index_text(files, arrays), encoding="utf-8")
    sync(hidden)
    hidden.rename(index)
    sync(folder)


def _write_file(file: Path, new: Sequence[NewPart]) -> tuple[dict[str, Any], Arrays]:
    """Write a file of parts; returns what the index says of it, and its arrays. The bytes are passed over once."""
    arrays, tensors = Arrays(), []
    for part in new:
        array = arrays.setdefault(part.name, StoredArray(part.name, part.code, part.whole))
        crcs: list[int] = []
        key = key_of(part.name, part.whole, part.box)
        array.parts.append(Part(file, part.name, key, part.box, crcs))
        tensors.append(NewTensor(key, part.code, part.box.shape, partial(_summed, part, crcs)))
    write_tensors(file, tensors)
    sync(file)
    return file_entry(file), arrays


def _summed(part: NewPart, crcs: list[int]) -> Iterator[memoryview]:
    """The bytes of a part, while the CRC-32 of each of its blocks is appended to `crcs`."""
    sizes = [ITEM_BYTES[part.code] * block.size for block in blocks(part.box, is_expert(part.name))]
    left, crc = 0, 0
    for chunk in part.chunks():
        view = memoryview(chunk)
        while view:
            left = left or sizes[len(crcs)]
            piece, view = view[:left], view[left:]
            crc, left = zlib.crc32(piece, crc), left - len(piece)
            if not left:
                crcs.append(crc)
                crc = 0
            yield piece


def give_up(folder: Path, rank: int, ranks: int, reason: str) -> None:
    """Tell the first rank that this one cannot write its files, which are deleted first: the disk may be full.

    Once there is an index, the first rank may already rely on the files, which are complete.
    """
    with suppress(OSError):
        if (folder / index_file(rank, ranks)).exists():
            return
        for kind in KINDS:
            (folder / array_file(kind, rank, ranks)).unlink(missing_ok=True)
        hidden = folder / f".{FAILED}{rank:05d}"
        hidden.write_text(reason, encoding="utf-8")
        hidden.rename(folder / hidden.name[1:])


def complete(folder: Path, meta: CheckpointMeta, ranks: int, seconds: float) -> None:
    """Wait for the files of all ranks, check that they are every entry once, and write meta.json.

    Args:
        folder: the temporary folder of the checkpoint.
        meta: what meta.json says.
        ranks: how many write.
        seconds: longest time to wait.

    Raises WriteError if files of a rank do not come, or if one has given up.
    """
    indexes: dict[str, Any] = {}
    files: dict[str, Any] = {}
    end = time.monotonic() + seconds
    for rank in range(ranks):
        index = folder / index_file(rank, ranks)
        while not index.exists():
            for name in sorted(os.listdir(folder)):  # network storage then asks again for what was not there
                if name.startswith(FAILED):
                    reason = (folder / name).read_text(encoding="utf-8")
                    raise WriteError(f"rank {int(name.removeprefix(FAILED))} cannot write its part: {reason}")
            if time.monotonic() > end:
                raise WriteError(
                    f"{folder.parent}: rank {rank} has not written its part of the checkpoint of step {meta.step} "
                    f"within {seconds:.0f} seconds; see its output, and put run.dir on storage that all nodes share"
                )
            time.sleep(LOOK_SECONDS)
        indexes[index.name] = json.loads(index.read_text(encoding="utf-8"))
        files |= indexes[index.name]["files"] | {index.name: file_entry(index)}
    read_arrays(folder, indexes)
    (folder / META_FILE).write_text(meta_text(meta, files), encoding="utf-8")
