"""Which expert's rows each tile of a grouped product has: a table made on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeport.backends.torch.cuda.layout import Layout


class Table(NamedTuple):
    """Tiles of rows, in the order of the experts."""

    tiles: Tensor
    """Expert and first row of each, int32; more pairs than there are tiles, which is known on the device only."""
    total: Tensor
    """The number of tiles."""
    ranked: Tensor
    """The experts, those with the most rows first."""


@triton.jit
def table_kernel(ends, tiles, total, ranked, E: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    other = tl.arange(0, BLOCK)
    begin = tl.load(ends + other - 1, mask=(other > 0) & (other < E), other=0)
    count = tl.load(ends + other, mask=other < E, other=0) - begin
    count = tl.where(other < E, count, 0)
    number = (count + BM - 1) // BM
    mine = tl.sum(tl.where(other == expert, count, 0))
    before = tl.sum(tl.where(other < expert, number, 0))
    start = tl.sum(tl.where(other == expert, begin, 0))
    busier = (count > mine) | ((count == mine) & (other < expert))
    tl.store(ranked + tl.sum(tl.where((other < E) & busier, 1, 0)), expert)
    own = (mine + BM - 1) // BM
    for i in range(0, own, BLOCK):
        at = i + other
        tl.store(tiles + 2 * (before + at), tl.zeros((BLOCK,), tl.int32) + expert, mask=at < own)
        tl.store(tiles + 2 * (before + at) + 1, start + at * BM, mask=at < own)
    if expert == E - 1:
        tl.store(total, before + own)


@triton.jit
def tile_of(tile, table, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Expert, first row and column tile of a tile: those of GROUP row tiles come before the next columns."""
    span = GROUP * tiles_n
    first = tile // span * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    m = first + tile % span % size
    return tl.load(table + 2 * m), tl.load(table + 2 * m + 1), tile % span // size


@triton.jit
def rows_of(order, row, end, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from one on, what each is in an array that has tokens if CHOICES is not 0, and whether the expert has it."""
    rows = row + tl.arange(0, BLOCK)
    live = rows < end
    source = rows
    if CHOICES > 0:
        source = tl.load(order + rows, mask=live, other=0) // CHOICES
    return rows.to(tl.int64), source.to(tl.int64), live


@triton.jit
def columns_of(tile, BLOCK: tl.constexpr):
    """The columns of a tile."""
    return tile * BLOCK + tl.arange(0, BLOCK)


def table_of(layout: Layout, rows: int, block: int) -> Table:
    """The tiles of `block` rows of a layout. Nothing waits: the table has room for any load."""
    experts = layout.ends_E.shape[0]
    most = rows // block + experts
    tiles, total, ranked = (
        torch.empty(size, dtype=torch.int32, device=layout.ends_E.device) for size in (2 * most, 1, experts)
    )
    room = max(triton.next_power_of_2(experts), 16)
    table_kernel[(experts,)](layout.ends_E, tiles, total, ranked, experts, block, room, num_warps=4)
    return Table(tiles, total, ranked)
