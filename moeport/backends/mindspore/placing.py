"""One-dimensional parameters of MindSpore, filled block by block, and read on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter, Tensor
from mindspore import ops as msops

from moeport.backends.mindspore.device import is_on_cpu
from moeport.backends.mindspore.division import Piece
from moeport.core.weights import Box, read_part

FILLED = 2**23
"""Most elements that are read at a time: enough to be drawn on several cores."""


def placed(name: str, size: int, kind: str, requires_grad: bool = False) -> Parameter:
    """Zeros.

    A Parameter copies its tensor. That of numpy's zeros takes no memory on Linux, as long as nobody writes to it.
    """
    return Parameter(Tensor.from_numpy(np.zeros(size, kind)), name=name, requires_grad=requires_grad)


def fill(p: Parameter, arrays: Mapping[str, np.ndarray], name: str, parts: Iterable[Box], kind: str) -> None:
    """Set a parameter to parts of a named array, one behind the other; no more than FILLED elements are read at a time.

    Args:
        p: one-dimensional.
        arrays: they have the array.
        name: of the array.
        parts: of the array, in the order in which they are stored.
        kind: numpy's name of the type of `p`.
    """
    first = 0
    for part in parts:
        for block in part.pieces(FILLED):
            values = np.ascontiguousarray(read_part(arrays, name, block), kind)
            put(p, Piece(name, first, block.size), Tensor(values.reshape(-1)))
            first += block.size


def put(p: Tensor, piece: Piece, values: Tensor) -> None:
    """Set a piece of an array in place.

    MindSpore makes an array of which all is set through a slice a view, and the operators that change their argument
    in place leave a view as it is, some without an error.
    """
    if piece.count == p.size:
        msops.assign(p, values)
    else:
        p[piece.slice] = values


def on_host(p: Parameter, piece: Piece) -> np.ndarray:
    """A piece of a parameter; on the CPU a view of it."""
    if is_on_cpu():
        return p.asnumpy()[piece.slice]
    return p[piece.slice].asnumpy()
