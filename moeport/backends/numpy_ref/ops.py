"""Ops in numpy, each written in the simplest way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from moeport.core.ops import Ops

Array = Any
"""np.ndarray; Any, because an override may not narrow its arguments."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


class NumpyOps(Ops):
    """Primitives only: every kernel is its default composition."""

    @override
    def from_numpy(self, array: np.ndarray) -> Array:
        return array.astype(np.int64) if array.dtype.kind in "iu" else array.copy()

    @override
    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)

    @override
    def on_host(self, x: Array) -> np.ndarray | None:
        return x

    @override
    def constant(self, value: float, dtype: str) -> Any:
        return np.dtype(dtype).type(value)

    @override
    def zeros(self, shape: Sequence[int], dtype: str) -> Array:
        return np.zeros(tuple(shape), dtype)

    @override
    def index(self, value: int) -> Any:
        return np.int64(value)

    @override
    def arange(self, n: int) -> Array:
        return np.arange(n)

    @override
    def dtype(self, x: Array) -> str:
        return str(x.dtype)

    @override
    def cast(self, x: Array, dtype: str) -> Array:
        return x.astype(dtype)

    @override
    def stop_gradient(self, x: Array) -> Array:
        return x

    @override
    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return np.reshape(x, tuple(shape))

    @override
    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return np.transpose(x, tuple(axes))

    @override
    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        return np.concatenate(list(xs), axis)

    @override
    def split(self, x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        return np.split(x, np.cumsum(sizes)[:-1], axis)

    @override
    def exp(self, x: Array) -> Array:
        return np.exp(x)

    @override
    def log(self, x: Array) -> Array:
        return np.log(x)

    @override
    def rsqrt(self, x: Array) -> Array:
        return x.dtype.type(1) / np.sqrt(x)

    @override
    def sigmoid(self, x: Array) -> Array:
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, x.dtype.type(1), e) / (x.dtype.type(1) + e)

    @override
    def erf(self, x: Array) -> Array:
        return _erf(x).astype(x.dtype)

    @override
    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, x, y)

    @override
    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.asarray(np.sum(x, axis=axis, keepdims=keepdims))

    @override
    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.asarray(np.mean(x, axis=axis, keepdims=keepdims))

    @override
    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return np.asarray(np.max(x, axis=axis, keepdims=keepdims))

    @override
    def cumsum(self, x: Array, axis: int) -> Array:
        return np.cumsum(x, axis=axis, dtype=x.dtype)

    @override
    def softmax(self, x: Array) -> Array:
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return e / np.sum(e, axis=-1, keepdims=True)

    @override
    def logsumexp(self, x: Array) -> Array:
        top = np.max(x, axis=-1, keepdims=True)
        return (top + np.log(np.sum(np.exp(x - top), axis=-1, keepdims=True)))[..., 0]

    @override
    def matmul(self, x: Array, y: Array) -> Array:
        return np.matmul(x, y)

    @override
    def take_rows(self, x: Array, ids: Array) -> Array:
        return x[ids]

    @override
    def take_last(self, x: Array, ids: Array) -> Array:
        return np.take_along_axis(x, ids, axis=-1)

    @override
    def segment_sum(self, values: Array, ids: Array, n: int) -> Array:
        out = np.zeros((n, *values.shape[1:]), values.dtype)
        np.add.at(out, ids, values)
        return out

    @override
    def one_hot(self, ids: Array, n: int, dtype: str) -> Array:
        return (np.asarray(ids)[..., None] == np.arange(n)).astype(dtype)

    @override
    def bincount(self, ids: Array, n: int) -> Array:
        return np.bincount(ids, minlength=n)

    @override
    def argsort(self, x: Array, descending: bool = False) -> Array:
        return np.argsort(-x if descending else x, kind="stable")

    @override
    def topk_ids(self, x: Array, k: int) -> Array:
        return np.argsort(-x, axis=-1, kind="stable")[..., :k]
