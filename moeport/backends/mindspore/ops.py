"""Ops in MindSpore, using only functions that its CPU target has.

Most of `mindspore.mint` has no CPU kernel, so `mindspore.ops` is used. Indices are int32, and every scalar is a tensor,
because MindSpore rounds Python numbers to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import ops as msops
from typing_extensions import override

from moeport.core.ops import Ops

DTYPES = {"bfloat16": ms.bfloat16, "float32": ms.float32, "float64": ms.float64}
INDEX = ms.int32
_MAX_ARGMAX = 8
"""Up to this k, repeated argmax is faster than sorting."""


def numpy_type(dtype: Any) -> np.dtype:
    """The numpy type of a MindSpore type other than bfloat16."""
    return np.dtype(str(dtype).lower())


def zeros(shape: Sequence[int], dtype: Any) -> Tensor:
    """Zeros of a MindSpore type; created on the host, where numpy has no bfloat16."""
    if dtype == ms.bfloat16:
        return zeros(shape, ms.float32).astype(dtype)
    return Tensor(np.zeros(tuple(shape), numpy_type(dtype)))


class MindSporeOps(Ops):
    """Primitives, and kernels that have a better form than their default composition."""

    @override
    def from_numpy(self, array: np.ndarray) -> Tensor:
        return Tensor(np.array(array, np.int32 if array.dtype.kind in "iu" else array.dtype))

    @override
    def to_numpy(self, x: Tensor) -> np.ndarray:
        y: Tensor = self.accurate(x)
        return y.asnumpy().copy()

    @override
    def constant(self, value: float, dtype: str) -> Tensor:
        return Tensor(value, DTYPES[dtype])

    @override
    def zeros(self, shape: Sequence[int], dtype: str) -> Tensor:
        return zeros(shape, DTYPES[dtype])

    @override
    def index(self, value: int) -> Tensor:
        return Tensor(value, INDEX)

    @override
    def arange(self, n: int) -> Tensor:
        return Tensor(np.arange(n, dtype=np.int32))

    @override
    def dtype(self, x: Tensor) -> str:
        return str(x.dtype).lower()

    @override
    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.astype(DTYPES[dtype])

    @override
    def stop_gradient(self, x: Tensor) -> Tensor:
        return msops.stop_gradient(x)

    @override
    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return msops.reshape(x, tuple(shape))

    @override
    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return msops.transpose(x, tuple(axes))

    @override
    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Empty pieces are left out, since their gradient fails."""
        pieces = [x for x in xs if x.shape[axis]] or list(xs[:1])
        return msops.cat(pieces, axis) if len(pieces) > 1 else pieces[0]

    @override
    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
        """Empty pieces are constants, since the gradient of an empty slice fails."""
        axis %= x.ndim
        pieces, start = [], 0
        for size in sizes:
            if size:
                pieces.append(msops.narrow(x, axis, start, size))
            else:
                shape = (*x.shape[:axis], 0, *x.shape[axis + 1 :])
                pieces.append(zeros(shape, x.dtype))
            start += size
        return pieces

    @override
    def exp(self, x: Tensor) -> Tensor:
        return msops.exp(x)

    @override
    def log(self, x: Tensor) -> Tensor:
        return msops.log(x)

    @override
    def rsqrt(self, x: Tensor) -> Tensor:
        return msops.rsqrt(x)

    @override
    def sigmoid(self, x: Tensor) -> Tensor:
        return msops.sigmoid(x)

    @override
    def erf(self, x: Tensor) -> Tensor:
        return msops.erf(x)

    @override
    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return msops.where(condition, x, y)

    @override
    def sum(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return x.sum() if axis is None else x.sum(axis, keepdims=keepdims)

    @override
    def mean(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return msops.mean(x) if axis is None else msops.mean(x, axis, keepdims)

    @override
    def max(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        return msops.amax(x, axis, keepdims)

    @override
    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        return msops.cumsum(x, axis)

    @override
    def softmax(self, x: Tensor) -> Tensor:
        return msops.softmax(x, -1)

    @override
    def logsumexp(self, x: Tensor) -> Tensor:
        return msops.logsumexp(x, -1)

    @override
    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return msops.matmul(x, y)

    @override
    def take_rows(self, x: Tensor, ids: Tensor) -> Tensor:
        """Without rows the result is a constant, since the gradient of an empty gather fails."""
        if not ids.size:
            return zeros((*ids.shape, *x.shape[1:]), x.dtype)
        return msops.gather(x, ids, 0)

    @override
    def take_last(self, x: Tensor, ids: Tensor) -> Tensor:
        return msops.gather_elements(x, x.ndim - 1, ids)

    @override
    def segment_sum(self, values: Tensor, ids: Tensor, n: int) -> Tensor:
        """Without rows the result is zeros, since the CPU target's kernel refuses empty inputs."""
        if not ids.size:
            return zeros((n, *values.shape[1:]), values.dtype)
        return msops.unsorted_segment_sum(values, ids, n)

    @override
    def one_hot(self, ids: Tensor, n: int, dtype: str) -> Tensor:
        """Computed in float32, the only type that the CPU target has for it."""
        return msops.one_hot(ids, n, Tensor(1, ms.float32), Tensor(0, ms.float32)).astype(DTYPES[dtype])

    @override
    def bincount(self, ids: Tensor, n: int) -> Tensor:
        return self.segment_sum(Tensor(np.ones(ids.shape, np.int32)), ids, n)

    @override
    def argsort(self, x: Tensor, descending: bool = False) -> Tensor:
        n = x.shape[0]
        return msops.reshape(_stable_order(msops.reshape(x, (1, n)), descending), (n,)) if n > 1 else self.arange(n)

    @override
    def topk_ids(self, x: Tensor, k: int) -> Tensor:
        """Repeated argmax for a small k, which follows the pinned tie rule, otherwise a stable sort."""
        x = msops.stop_gradient(x)
        if k > _MAX_ARGMAX:
            order = _stable_order(msops.reshape(x, (-1, x.shape[-1])), descending=True)
            return msops.reshape(order[:, :k], (*x.shape[:-1], k))
        kind, width = numpy_type(x.dtype), x.shape[-1]
        # An array, since a trace turns a scalar near the lowest float32 into minus infinity.
        x = msops.maximum(x, Tensor(np.full(width, np.finfo(kind).min, kind)))
        taken = Tensor(-np.inf, x.dtype)
        position = self.arange(width)
        ids = []
        for _ in range(k):
            best = msops.expand_dims(msops.argmax(x, -1).astype(INDEX), -1)
            ids.append(best)
            x = msops.where(position == best, taken, x)
        return msops.cat(ids, -1)

    # ------------------------------------------------------------------ kernels

    @override
    def inverse(self, order_N: Tensor) -> Tensor:
        """A sum by place, since each place occurs once; a sort would be two, see `_stable_order`."""
        return self.segment_sum(self.arange(order_N.shape[0]), order_N, order_N.shape[0])

    @override
    def sort_by_group(self, group_N: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """One sort, of keys that are all different."""
        size = group_N.shape[0]
        if size < 2:
            return super().sort_by_group(group_N, groups)
        length = Tensor(size, ms.int64)
        entry_N = Tensor(np.arange(size, dtype=np.int64))
        key, _ = msops.sort(msops.reshape(group_N.astype(ms.int64) * length + entry_N, (1, size)), -1)
        order_N = msops.reshape(key % length, (size,)).astype(INDEX)
        return order_N, self.inverse(order_N), self.bincount(group_N, groups)

    @override
    def gelu(self, x: Tensor) -> Tensor:
        """The fused operator, since the CPU target has no erf in float64."""
        return msops.gelu(x, approximate="none")


def _stable_order(x: Tensor, descending: bool) -> Tensor:
    """Order of each row of at least two values; the CPU target's sort is not stable, so runs of equal values are
    sorted again by position.
    """
    rows, size = x.shape
    values, order = msops.sort(x, -1, descending)
    changes = (values[:, 1:] != values[:, :-1]).astype(INDEX)
    run = msops.cat((Tensor(np.zeros((rows, 1), np.int32)), msops.cumsum(changes, 1)), 1)
    length = Tensor(size, ms.int64)
    key, _ = msops.sort(run.astype(ms.int64) * length + order.astype(ms.int64), -1)
    return (key % length).astype(INDEX)
