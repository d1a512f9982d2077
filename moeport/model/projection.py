"""A projection with the bias that it may have."""

from __future__ import annotations

from collections.abc import Mapping

from moeport.core.array import Array
from moeport.core.ops import Ops


def project(ops: Ops, params: Mapping[str, Array], name: str, x: Array) -> Array:
    """x (..., I) times a weight (O, I), plus its bias if it has one. Returns (..., O)."""
    y = ops.linear(x, params[name])
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + ops.cast(bias, ops.dtype(y))
