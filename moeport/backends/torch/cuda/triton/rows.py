"""How the kernels that pass once over rows divide them among programs."""

from __future__ import annotations

TILE = 2048
"""Elements of a tile whose rows are narrower than it."""


def rows_of_tile(block: int) -> int:
    """Rows that one program takes at a time. Args: block: width of a row, padded to a power of two."""
    return max(1, TILE // block)


def warps(elements: int) -> int:
    """Warps of 32 threads for a tile, so that a thread has 16 elements, or up to 32 of the widest rows."""
    return min(16, max(1, elements // 512))
