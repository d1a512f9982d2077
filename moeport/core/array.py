"""What neutral code may use of an array, whatever framework it belongs to."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Protocol

Index = int | slice | EllipsisType
"""Indices are constants; data-dependent selection goes through `Ops.take_rows` and `Ops.take_last`."""


class Array(Protocol):
    """An array of the backend: numpy.ndarray, torch.Tensor or mindspore.Tensor.

    Arithmetic, comparison, slicing and shape; everything else is in `moeport.core.ops.Ops`. The other operand is an
    array, or a scalar from `Ops.constant` or `Ops.index`; it is typed Any because numpy's stubs do not accept a
    Protocol.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dimensions."""

    def __getitem__(self, index: Index | tuple[Index, ...], /) -> Array: ...

    def __neg__(self) -> Array: ...

    def __add__(self, other: Any, /) -> Array: ...

    def __sub__(self, other: Any, /) -> Array: ...

    def __mul__(self, other: Any, /) -> Array: ...

    def __truediv__(self, other: Any, /) -> Array: ...

    def __floordiv__(self, other: Any, /) -> Array: ...

    def __mod__(self, other: Any, /) -> Array: ...

    def __lt__(self, other: Any, /) -> Array: ...

    def __le__(self, other: Any, /) -> Array: ...

    def __gt__(self, other: Any, /) -> Array: ...

    def __ge__(self, other: Any, /) -> Array: ...

    def __eq__(self, other: object, /) -> Array: ...  # type: ignore[override]  # elementwise
