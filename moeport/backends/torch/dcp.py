"""Folders of torch.distributed.checkpoint (DCP), read and written a part at a time, in one process without a group.

Only the documented interfaces of its planners and of its file system storage are used: a plan says which parts are
moved, and the storage moves them (https://docs.pytorch.org/docs/stable/distributed.checkpoint.html).
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from bisect import bisect_left
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from typing_extensions import override

from moeport.core.weights import Box, Weights, overlapping
from moeport.errors import DataError

METADATA = ".metadata"
"""The file that says what a folder holds."""
FILE_BYTES = 2**26
"""Most bytes of a file, and of a part of a tensor, unless one index of the first dimension has more. All of a file is
held in memory while it is written."""
TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "float32",
    torch.float16: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
"""The type in numpy as which each type is read: the narrowest that holds all of its numbers exactly."""
_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}
"""What metadata are made of, besides types, layouts and paths. Classes are listed one by one, since a dotted name leads
from a module to all that it imports: `os.system` of `torch.distributed.checkpoint.filesystem` would be found."""
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}
"""Classes of pathlib, which a checkpoint may name as Python 3.13 or another system calls them; nothing reads them."""
_FAULTS = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
)
"""What the library raises for files that are damaged."""


class DcpWeights(Weights):
    """The tensors in a folder that torch.distributed.checkpoint wrote, from any number of ranks.

    Args:
        folder: holds `.metadata` and the files that it names.

    Raises DataError if a tensor is not there completely and once, has a type that numpy lacks, or a file is cut off.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = _Reader(folder)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._boxes: dict[str, list[Box]] = {}
        """The parts of each tensor that have elements, by where they begin."""
        self._tallest: dict[str, int] = {}
        """The most rows of one of them."""
        self.others: list[str] = []
        """Entries that are no tensors, such as the settings of an optimiser; they are not read."""
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except _FAULTS as error:
            raise DataError(f"{folder / METADATA}: cannot be read as torch's: {error}; save it again") from error
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self._tensors[name] = entry
                self._check(name, entry)
            else:
                self.others.append(name)

    def _check(self, name: str, entry: TensorStorageMetadata) -> None:
        if entry.properties.dtype not in TYPES:
            listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
            raise DataError(f"{self.folder}: {name} has the type {entry.properties.dtype}; expected one of {listed}")
        whole = Box.whole(tuple(entry.size))
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        self._boxes[name] = boxes = sorted((box for box in boxes if box.size), key=lambda box: box.start)
        for box in boxes:
            if len(box.start) != len(whole.shape) or box.intersection(whole) != box:
                raise DataError(f"{self.folder}: {name} has a part at {box.start} of {box.shape} outside {whole.shape}")
            self._check_file(name, box, entry.properties.dtype)
        self._tallest[name] = max((box.shape[0] for box in boxes if box.shape), default=0)
        if found := overlapping(boxes):
            raise DataError(f"{self.folder}: {name} has elements at {boxes[found[1]].start} that are stored twice")
        if sum(box.size for box in boxes) != whole.size:
            raise DataError(
                f"{self.folder}: {name} is incomplete: {sum(box.size for box in boxes):,} of {whole.size:,} elements "
                "are there; copy the files of all ranks"
            )

    def _check_file(self, name: str, box: Box, dtype: torch.dtype) -> None:
        """Refuse a part whose bytes are not there."""
        place = self._reader.storage_data.get(MetadataIndex(name, box.start))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise DataError(f"{self.folder}: the place of {name} at {box.start} is not in {METADATA}; save it again")
        file = self.folder / place.relative_path
        if not file.is_file():
            raise DataError(f"{file}: missing; it holds a part of {name}; copy the files of all ranks")
        packed = place.transform_descriptors
        if file.stat().st_size < place.offset + place.length or (
            not packed and place.length < box.size * dtype.itemsize
        ):
            raise DataError(f"{file}: cut off within {name}; copy it again")

    def _near(self, name: str, box: Box) -> list[Box]:
        """The parts of a tensor among which are all that have elements in `box`: others need no look each time."""
        boxes = self._boxes[name]
        if not boxes or not box.shape:
            return boxes
        ends = box.start[0] - self._tallest[name] + 1, box.start[0] + box.shape[0]
        first, last = (bisect_left(boxes, end, key=lambda other: other.start[0]) for end in ends)
        return boxes[first:last]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    @override
    def dtype(self, name: str) -> str:
        return TYPES[self._tensors[name].properties.dtype]

    @property
    @override
    def names(self) -> Collection[str]:
        return self._tensors

    @override
    def bands(self, name: str) -> list[Box]:
        whole = Box.whole(self.shape(name))
        if not whole.shape or not whole.size:
            return [whole]
        starts = sorted({box.start[0] for box in self._boxes[name]})
        ends = [*starts[1:], whole.shape[0]]
        return [whole.rows(start, end - start) for start, end in zip(starts, ends, strict=True)]

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        entry = self._tensors[name]
        target = torch.empty(box.shape, dtype=entry.properties.dtype)
        items = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(name, box.start),
                dest_offsets=torch.Size(common.within(box).start),
                storage_index=MetadataIndex(name, chunk.start),
                storage_offsets=torch.Size(common.within(chunk).start),
                lengths=torch.Size(common.shape),
            )
            for chunk in self._near(name, box)
            if (common := chunk.intersection(box)) is not None
        ]
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except _FAULTS as error:
            raise DataError(f"{self.folder}: {name} cannot be read: {error}; save or copy it again") from error
        found: np.ndarray = target.to(getattr(torch, TYPES[target.dtype])).numpy()
        return found


class _Reader(dcp.FileSystemReader):
    """Reads the metadata, which are pickled, without running what else a pickle may name."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePath
        if (module, name) in _CLASSES or is_type:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor):
        self.target = target

    @override
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are asked for")

    @override
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        pass

    @override
    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made beforehand")

    @override
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    @override
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


def write_dcp(folder: Path, arrays: Weights) -> dict[str, str]:
    """Write arrays as torch.distributed.checkpoint does from as many ranks as there are files; returns their SHA-256.

    Args:
        folder: an empty one, whose files are not flushed to disk here.
        arrays: each is asked for its parts in order, once.

    Raises: OSError if the folder cannot be written, and whatever `arrays` raises when it is read.
    """
    planner, writer = _From(arrays), dcp.FileSystemWriter(folder, sync_files=False)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(SavePlan(own)) for own in planner.files()])
    results = [writer.write_data(plan, planner).value() for plan in writer.prepare_global_plan(plans)]
    writer.finish(metadata, results)
    return {name: digest.hexdigest() for name, digest in planner.digests.items()}


class _From(SavePlanner):
    """Gives the storage one part after the other."""

    def __init__(self, arrays: Weights):
        self.arrays = arrays
        self.digests: dict[str, Any] = {name: hashlib.sha256() for name in arrays}

    @override
    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    @override
    def create_local_plan(self) -> SavePlan:
        raise AssertionError("the plans are made beforehand")

    def files(self) -> Iterator[list[WriteItem]]:
        """The parts that share a file, of at most FILE_BYTES if there are several."""
        file: list[WriteItem] = []
        left = FILE_BYTES
        for item in (item for name in self.arrays for item in self._items(name)):
            data = item.tensor_data
            assert data is not None
            size = data.properties.dtype.itemsize * math.prod(data.chunk.sizes)
            if file and size > left:
                yield file
                file, left = [], FILE_BYTES
            file.append(item)
            left -= size
        yield file

    def _items(self, name: str) -> Iterator[WriteItem]:
        shape = self.arrays.shape(name)
        properties = TensorProperties(dtype=getattr(torch, self.arrays.dtype(name)))
        for box in chunks(shape, properties.dtype.itemsize):
            chunk = ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape))
            data = TensorWriteData(chunk, properties, torch.Size(shape))
            yield WriteItem(MetadataIndex(name, box.start), WriteItemType.SHARD, tensor_data=data)

    @override
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None
            entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            assert isinstance(entry, TensorStorageMetadata)
            entry.chunks.append(data.chunk)
        return all_plans, Metadata(entries, planner_data={name: _path(name) for name in entries})

    @override
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    @override
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        data, name = write_item.tensor_data, write_item.index.fqn
        assert data is not None
        values = self.arrays.read(name, Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
        values = np.ascontiguousarray(values).reshape(tuple(data.chunk.sizes))
        self.digests[name].update(values.tobytes())
        return torch.from_numpy(values)


def chunks(shape: tuple[int, ...], item_bytes: int) -> list[Box]:
    """An array cut along its first dimension into parts of at most FILE_BYTES, or of one index each."""
    whole = Box.whole(shape)
    if not shape or whole.size == 0:
        return [whole]
    rows = max(1, FILE_BYTES // (item_bytes * math.prod(shape[1:])))
    return [whole.rows(first, min(rows, shape[0] - first)) for first in range(0, shape[0], rows)]


def _path(name: str) -> tuple[str, ...]:
    """Where a tensor is in the nested dict as which torch gives the whole folder, see `dcp_to_torch_save`."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in ("model", "optim", "optimizer") and rest else (name,)
