"""Arrays by name of which a process reads and holds parts, so that none holds the whole model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from typing_extensions import override

RUN_ENTRIES = 2**20
"""Most elements that are read at once of a run of consecutive ones."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of an array."""

    start: tuple[int, ...]
    """First index along each dimension."""
    shape: tuple[int, ...]
    """Number of indices along each dimension."""

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """All of an array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index the whole array with."""
        return tuple(slice(first, first + count) for first, count in zip(self.start, self.shape, strict=True))

    def rows(self, first: int, count: int) -> Box:
        """Of this part, `count` rows (indices of the first dimension) from its row `first` on."""
        return self.along(0, first, count)

    def along(self, dim: int, first: int, count: int) -> Box:
        """Of this part, `count` indices of a dimension from its index `first` on."""
        start, shape = list(self.start), list(self.shape)
        start[dim], shape[dim] = start[dim] + first, count
        return Box(tuple(start), tuple(shape))

    def pieces(self, entries: int) -> Iterator[Box]:
        """Parts, in order, that make up this one and have at most `entries` entries each.

        Pieces are rows that follow each other; of rows that are too large, pieces of one row at a time.
        """
        if self.size <= entries:
            yield from [self] if self.size else []
            return
        dim = next(dim for dim, count in enumerate(self.shape) if count > 1)
        step = max(1, entries // (self.size // self.shape[dim]))
        for first in range(0, self.shape[dim], step):
            yield from self.along(dim, first, min(step, self.shape[dim] - first)).pieces(entries)

    def share(self, index: int, count: int) -> Box:
        """One of `count` parts of about the same size that make up this one, which has a dimension; it may be empty.

        It is cut along the first dimension that is long enough, or along the longest.
        """
        dim = next((d for d, n in enumerate(self.shape) if n >= count), int(np.argmax(self.shape)))
        first, end = (self.shape[dim] * i // count for i in (index, index + 1))
        return self.along(dim, first, end - first)

    def intersection(self, other: Box) -> Box | None:
        """What both parts have in common; None if there is nothing."""
        starts = tuple(map(max, self.start, other.start))
        ends = [min(s + n, t + m) for s, n, t, m in zip(self.start, self.shape, other.start, other.shape, strict=True)]
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, shape) if all(count > 0 for count in shape) else None

    def within(self, other: Box) -> Box:
        """This part, counted from the beginning of another that contains it."""
        return Box(tuple(s - t for s, t in zip(self.start, other.start, strict=True)), self.shape)


def overlapping(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """The numbers of two parts of one array that have an entry in common; None if there are none.

    Args:
        boxes: the parts, sorted by `start`.
    """
    if len(boxes) < 2 or all(
        one.start and one.start[0] + one.shape[0] <= next_.start[0] for one, next_ in pairwise(boxes)
    ):
        return None
    starts = np.array([box.start for box in boxes])
    ends = starts + np.array([box.shape for box in boxes])
    for number in range(len(boxes)):
        rest = slice(number + 1, None)
        common = np.maximum(starts[rest], starts[number]) < np.minimum(ends[rest], ends[number])
        if (found := common.all(axis=1)).any():
            return number, number + 1 + int(found.argmax())
    return None


@dataclass(frozen=True)
class Shard:
    """A part of a named array, and its contents."""

    name: str
    whole: tuple[int, ...]
    """Shape of the whole array."""
    box: Box
    """Which part of it this is."""
    array: np.ndarray
    """The contents, of shape `box.shape`."""


class Weights(Mapping[str, np.ndarray]):
    """Arrays by name that are read, drawn or computed only when they are asked for, whole or in part.

    Names are in a fixed order. Each access makes a new array.
    """

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """The names, in their order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, without reading it. Raises KeyError for a name that is not there."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """Numpy's name of the type of its elements."""

    @abstractmethod
    def read(self, name: str, box: Box) -> np.ndarray:
        """A part of an array; no more than it and one block more are held meanwhile."""

    def bands(self, name: str) -> list[Box]:
        """The array cut along its first dimension, so that reading all bands reads what is stored about once."""
        return [Box.whole(self.shape(name))]

    def run(self, name: str, start: int, count: int) -> Iterator[np.ndarray]:
        """`count` consecutive elements, row by row, from `start` on, in blocks (entries,) of at most RUN_ENTRIES."""
        for box in run_boxes(self.shape(name), start, count):
            yield self.read(name, box).reshape(-1)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name, Box.whole(self.shape(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        try:
            self.shape(str(name))
        except KeyError:
            return False
        return True


def run_boxes(shape: tuple[int, ...], start: int, count: int, most: int = RUN_ENTRIES) -> Iterator[Box]:
    """A run of consecutive elements, row by row, as parts of at most `most` elements, in order.

    Args:
        shape: of the whole array.
        start: first element.
        count: number of elements.
        most: of a part.
    """
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    while count:
        row, offset = divmod(start, inner)
        if offset == 0 and count >= inner and inner <= most:
            rows = min(count // inner, most // inner)
            yield Box((row, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            done = rows * inner
        else:
            done = min(count, inner - offset)
            for box in run_boxes(shape[1:], offset, done, most):
                yield Box((row, *box.start), (1, *box.shape))
        start, count = start + done, count - done


def read_part(arrays: Mapping[str, np.ndarray], name: str, box: Box) -> np.ndarray:
    """A part of a named array; of a plain mapping it is a view."""
    return arrays.read(name, box) if isinstance(arrays, Weights) else arrays[name][box.slices]


def shape_of(arrays: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """The shape of a named array, which is not read if it is one of `Weights`."""
    return arrays.shape(name) if isinstance(arrays, Weights) else arrays[name].shape


def dtype_of(arrays: Mapping[str, np.ndarray], name: str) -> str:
    """Numpy's name of the type of a named array, which is not read if it is one of `Weights`."""
    return arrays.dtype(name) if isinstance(arrays, Weights) else arrays[name].dtype.name


class Wrapped(Weights):
    """The same arrays; derived classes look at what is read of them.

    Args:
        arrays: any mapping of names to arrays.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._arrays, name)

    @override
    def dtype(self, name: str) -> str:
        return dtype_of(self._arrays, name)

    @override
    def bands(self, name: str) -> list[Box]:
        return self._arrays.bands(name) if isinstance(self._arrays, Weights) else super().bands(name)

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        return read_part(self._arrays, name, box)

    @property
    @override
    def names(self) -> Collection[str]:
        return self._arrays
