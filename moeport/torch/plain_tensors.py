"""Any tensor as a dense one of real numbers, which is what `moeport.torch.record` keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from moeport.backends.torch.sharding import whole
from moeport.parity.recording import STORED

READABLE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
"""Types that can be read as they are."""
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Types with few operations; the entries of int64 are as different."""


class UnreadableTensorError(Exception):
    """A tensor whose entries cannot be read; the message says why."""


@dataclass(frozen=True)
class Plain:
    """A tensor whose entries can be read."""

    tensor: Tensor
    """Dense, detached, of a type that numpy has, or of bfloat16."""
    dtype: str | None
    """Type that it is judged by, if that is another; None: its own."""
    how: str
    """What was done to make it plain, for the report; empty if nothing was."""


def plain(x: Tensor) -> Plain:
    """A tensor as a dense one of real numbers.

    The parts of a distributed tensor are gathered, which all its ranks must do. What is sparse becomes dense, the rows
    of a nested tensor are padded with zeros, quantised numbers are multiplied by their scale, 8-bit floats widened, and
    complex numbers become pairs (..., 2) of their real and imaginary parts.

    Raises UnreadableTensorError for a tensor without values, or of a type that cannot be read.
    """
    if is_lazy(x):
        raise UnreadableTensorError("it has no values before the first pass")
    if x.is_meta or type(x).__name__ == "FakeTensor":
        raise UnreadableTensorError("it is on the meta device, which holds no values")
    try:
        return _plain(x.detach())
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnreadableTensorError(f"its type {x.dtype} cannot be read ({first})") from error


def _plain(x: Tensor) -> Plain:
    how: list[str] = []
    x = whole(x)
    if x.is_nested:
        x, how = torch.nested.to_padded_tensor(x, 0.0), [*how, "nested, its rows padded with zeros"]
    if x.layout != torch.strided:
        x, how = x.to_dense(), [*how, f"{_layout(x)}, recorded as a dense tensor"]
    name = str(x.dtype).removeprefix("torch.")
    if x.is_quantized:
        x, how = x.dequantize(), [*how, f"quantised ({name}), multiplied by its scale"]
    x = x.resolve_conj().resolve_neg()
    if x.is_complex():
        x, how = torch.view_as_real(x), [*how, "complex, its real and imaginary parts are compared"]
    if x.dtype in UNSIGNED:
        x = x.to(torch.int64)
    if name.startswith("float8"):
        x = x.to(torch.float32)
    if x.dtype not in READABLE:
        raise UnreadableTensorError(f"its type {x.dtype} cannot be read")
    return Plain(x, name if name in STORED else None, "; ".join(how))


def _layout(x: Tensor) -> str:
    return str(x.layout).removeprefix("torch.").removeprefix("_").replace("_", " ")
