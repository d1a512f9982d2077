"""Ops in numpy, each written in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeport.core.ops import Ops

Array = Any
"""np.ndarray; Any, because an override may not narrow its arguments."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


class NumpyOps(Ops):
    """Primitives only: every kernel is its default composition."""

    def from_numpy(self, array: np.ndarray) -> Array:
        """See Ops."""
        return array.astype(np.int64) if array.dtype.kind in "iu" else array.copy()

    def to_numpy(self, x: Array) -> np.ndarray:
        """See Ops."""
        return np.array(x)

    def on_host(self, x: Array) -> np.ndarray | None:
        """See Ops."""
        return x

    def constant(self, value: float, dtype: str) -> Any:
        """See Ops."""
        return np.dtype(dtype).type(value)

    def zeros(self, shape: Sequence[int], dtype: str) -> Array:
        """See Ops."""
        return np.zeros(tuple(shape), dtype)

    def index(self, value: int) -> Any:
        """See Ops."""
        return np.int64(value)

    def arange(self, n: int) -> Array:
        """See Ops."""
        return np.arange(n)

    def dtype(self, x: Array) -> str:
        """See Ops."""
        return str(x.dtype)

    def cast(self, x: Array, dtype: str) -> Array:
        """See Ops."""
        return x.astype(dtype)

    def stop_gradient(self, x: Array) -> Array:
        """See Ops."""
        return x

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """See Ops."""
        return np.reshape(x, tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """See Ops."""
        return np.transpose(x, tuple(axes))

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        """See Ops."""
        return np.concatenate(list(xs), axis)

    def split(self, x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        """See Ops."""
        return np.split(x, np.cumsum(sizes)[:-1], axis)

    def exp(self, x: Array) -> Array:
        """See Ops."""
        return np.exp(x)

    def log(self, x: Array) -> Array:
        """See Ops."""
        return np.log(x)

    def rsqrt(self, x: Array) -> Array:
        """See Ops."""
        return x.dtype.type(1) / np.sqrt(x)

    def sigmoid(self, x: Array) -> Array:
        """See Ops."""
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, x.dtype.type(1), e) / (x.dtype.type(1) + e)

    def erf(self, x: Array) -> Array:
        """See Ops."""
        return _erf(x).astype(x.dtype)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """See Ops."""
        return np.where(condition, x, y)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        """See Ops."""
        return np.asarray(np.sum(x, axis=axis, keepdims=keepdims))

    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        """See Ops."""
        return np.asarray(np.mean(x, axis=axis, keepdims=keepdims))

    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        """See Ops."""
        return np.asarray(np.max(x, axis=axis, keepdims=keepdims))

    def cumsum(self, x: Array, axis: int) -> Array:
        """See Ops."""
        return np.cumsum(x, axis=axis, dtype=x.dtype)

    def softmax(self, x: Array) -> Array:
        """See Ops."""
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return e / np.sum(e, axis=-1, keepdims=True)

    def logsumexp(self, x: Array) -> Array:
        """See Ops."""
        top = np.max(x, axis=-1, keepdims=True)
        return (top + np.log(np.sum(np.exp(x - top), axis=-1, keepdims=True)))[..., 0]

    def matmul(self, x: Array, y: Array) -> Array:
        """See Ops."""
        return np.matmul(x, y)

    def take_rows(self, x: Array, ids: Array) -> Array:
        """See Ops."""
        return x[ids]

    def take_last(self, x: Array, ids: Array) -> Array:
        """See Ops."""
        return np.take_along_axis(x, ids, axis=-1)

    def segment_sum(self, values: Array, ids: Array, n: int) -> Array:
        """See Ops."""
        out = np.zeros((n, *values.shape[1:]), values.dtype)
        np.add.at(out, ids, values)
        return out

    def one_hot(self, ids: Array, n: int, dtype: str) -> Array:
        """See Ops."""
        return (np.asarray(ids)[..., None] == np.arange(n)).astype(dtype)

    def bincount(self, ids: Array, n: int) -> Array:
        """See Ops."""
        return np.bincount(ids, minlength=n)

    def argsort(self, x: Array, descending: bool = False) -> Array:
        """See Ops."""
        return np.argsort(-x if descending else x, kind="stable")

    def topk_ids(self, x: Array, k: int) -> Array:
        """See Ops."""
        return np.argsort(-x, axis=-1, kind="stable")[..., :k]
