"""Sorting in PyTorch: the best few of each row under the pinned tie rule, and rows by group.

On CPUs and CUDA nothing here waits for a device or depends on the order in which threads finish. Devices of other kinds
keep the plain functions, of which it is known that they serve them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KEYED = ("cpu", "cuda")
"""Types of devices that sort keys."""
MOST_PASSES = 8
"""Up to this k one pass for each of the k best is faster than sorting."""
MOST_COMPARED = 32
"""Up to this number of groups, comparing every entry with each of them is cheaper than sorting."""
SMALL = 2**10
"""Up to this many values a CPU sorts in less time than the operations of the passes take to start."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def best_ids(x: Tensor, k: int) -> Tensor:
    """Ids of the k largest along the last dimension, largest first; ties go to the lower id, and NaN is the largest.

    Up to MOST_PASSES the largest is looked for k times: torch.argmax gives the first of equal values. What was found is
    then replaced by a number that no float has as its key, so that minus infinity needs no special case. On CUDA each
    pass reads the keys once, whereas a stable sort writes and reads values and 64-bit ids several times.
    """
    if k == 1:
        return x.argmax(-1, keepdim=True)
    if not _is_few(k) or x.device.type not in KEYED or not x.is_floating_point() or _is_small(x):
        return x.sort(stable=True, dim=-1, descending=True).indices[..., :k]
    keys = ordered_keys(x)
    taken = torch.iinfo(keys.dtype).min
    found = []
    for _ in range(k - 1):
        found.append(keys.argmax(-1, keepdim=True))
        keys.scatter_(-1, found[-1], taken)
    return torch.cat([*found, keys.argmax(-1, keepdim=True)], -1)


def _is_few(k: int) -> bool:
    """Whether passes are faster than sorting; never for a k that varies within a compiled graph, such as the share of
    the tokens that an expert chooses: a graph has a fixed number of passes.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(k <= MOST_PASSES)
    return k <= MOST_PASSES


def _is_small(x: Tensor) -> bool:
    """Whether sorting is faster than any passes; not asked in a graph, whose sizes may vary."""
    return x.is_cpu and not torch.compiler.is_compiling() and x.numel() <= SMALL


def ordered_keys(x: Tensor) -> Tensor:
    """Integers of the width of the floats that are in the same order: both zeros are equal, and so is every NaN.

    The bits of a float, read as an integer, grow with it where it is positive, and fall where it is negative. The least
    integer belongs to no float.
    """
    kind = _BITS[x.element_size()]
    bits = torch.where(x != x, torch.nan, x + 0.0).view(kind)
    return bits ^ ((bits >> (8 * x.element_size() - 1)) & torch.iinfo(kind).max)


def inverse(order_N: Tensor) -> Tensor:
    """The inverse of a permutation, by writing each place where it belongs."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))


def by_group(group_N: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `Ops.sort_by_group`: one stable sort of keys of 8 or 16 bits; the counts are read from the sorted keys."""
    sorted_N, order_N = sorted_keys(group_N, groups)
    return order_N, inverse(order_N), counts(sorted_N, groups)


def sorted_keys(group_N: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Groups in ascending order as integers of few bits, and the entry of each place; entries of a group keep order."""
    kind = torch.uint8 if groups <= 2**8 else torch.int16 if groups <= 2**15 else torch.int64
    sorted_N, order_N = group_N.to(kind).sort(stable=True)
    return sorted_N, order_N


def counts(sorted_N: Tensor, groups: int) -> Tensor:
    """How often each of 0 .. groups-1 occurs in sorted keys."""
    keys_G = torch.arange(groups, device=sorted_N.device).to(sorted_N.dtype)
    ends_G = torch.searchsorted(sorted_N, keys_G, right=True)
    return torch.diff(ends_G, prepend=ends_G[:1] * 0)


def by_group_on_host(group_N: np.ndarray, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by numpy, whose sort of small keys counts them, on one thread: torch's waits for threads that another
    process may hold up.
    """
    kind = np.uint8 if groups <= 2**8 else np.uint16 if groups <= 2**16 else np.int64
    order_N = group_N.astype(kind).argsort(kind="stable")
    position_N = np.empty_like(order_N)
    position_N[order_N] = np.arange(len(order_N))
    counts_G = np.bincount(group_N, minlength=groups)
    return torch.from_numpy(order_N), torch.from_numpy(position_N), torch.from_numpy(counts_G)
