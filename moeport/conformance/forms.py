"""Other forms of a backend's operations."""

from __future__ import annotations

from typing import Any

from moeport.core.ops import KERNELS, Ops


def with_methods(ops: Ops, name: str, **methods: Any) -> Any:
    """Operations like these, in a class of that name that has other methods."""
    kind: Any = type(name, (type(ops),), methods)
    other = kind.__new__(kind)
    vars(other).update(vars(ops))
    return other


def with_default_kernels(ops: Ops) -> Any:
    """The same operations with every kernel composed of primitives."""
    return with_methods(ops, "DefaultKernels", **{name: getattr(Ops, name) for name in KERNELS})
