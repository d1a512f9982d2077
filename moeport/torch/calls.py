"""What the training calls of a layer add up to until its router state is updated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeport.backends.torch.private import inside_torch_func, is_repeated, outside_torch_func, unwrapped


def add_up(so_far: Sequence[Tensor] | None, measured: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The sums after one more training call.

    The forward pass that an activation checkpoint repeats during the backward pass adds nothing.

    Args:
        so_far: the sums before the call; None: it is the first.
        measured: what the call measured.
    """
    if torch.compiler.is_compiling():
        return _sums(so_far, [_zero_if_repeated(x) for x in measured])
    if is_repeated():
        return None if so_far is None else tuple(so_far)
    if not inside_torch_func():
        return _sums(so_far, measured)
    with outside_torch_func():  # what torch.func wraps cannot be read after its transform
        return _sums(so_far, [unwrapped(x) for x in measured])


def _sums(so_far: Sequence[Tensor] | None, measured: Sequence[Tensor]) -> tuple[Tensor, ...]:
    measured = [x.detach() for x in measured]
    if so_far is None:
        return tuple(measured)
    return tuple(old.to(new.device) + new for old, new in zip(so_far, measured, strict=True))


@torch.library.custom_op("moeport::zero_if_repeated", mutates_args=())
def _zero_if_repeated(x: Tensor) -> Tensor:
    """`is_repeated` as an operation that a compiled graph performs in each call."""
    return torch.zeros_like(x) if is_repeated() else x.clone()


@_zero_if_repeated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def over_ranks(sums: Sequence[Tensor], group: dist.ProcessGroup) -> list[np.ndarray]:
    """The sums over the ranks of a group, on the host. They are added in the order of the ranks, so all get the same.

    Args:
        sums: of this rank.
        group: every rank of it must call this.
    """
    totals = []
    for x in sums:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        totals.append(on_host(torch.stack(parts)).sum(0))
    return totals


def on_host(x: Tensor) -> np.ndarray:
    """A copy in float64, or in int64 for counts."""
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x.long()).numpy()
