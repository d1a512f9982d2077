"""Bytes that the collectives of one communicator move, by name, inside a node and between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass
class Volume:
    """What one collective has sent from this rank to others; what a rank keeps for itself does not count."""

    calls: int = 0
    intra_node_rows: int = 0
    """Entries of the first dimension; an array without dimensions is one row."""
    inter_node_rows: int = 0
    intra_node_bytes: int = 0
    inter_node_bytes: int = 0
    seconds: float = field(default=0.0, compare=False)
    """Spent in the calls by this process, waiting for others included; on an accelerator until they were launched. Only
    `all_to_all` counts it."""

    def __add__(self, other: Volume) -> Volume:
        return Volume(
            self.calls + other.calls,
            self.intra_node_rows + other.intra_node_rows,
            self.inter_node_rows + other.inter_node_rows,
            self.intra_node_bytes + other.intra_node_bytes,
            self.inter_node_bytes + other.inter_node_bytes,
            self.seconds + other.seconds,
        )


@dataclass
class Traffic:
    """Volumes by name of the collective.

    They are those of the direct algorithm, in which a rank sends each other rank what that one needs: `all_gather`
    sends the whole array to each, `broadcast` does so at its source, `reduce_scatter` sends each its part, `all_reduce`
    is a `reduce_scatter` and an `all_gather` of the parts, rounded up to whole rows. A library may forward data on
    another path. `all_to_all` counts its gradient too; exchanges of arrays of one dimension, such as counts, are
    `all_to_all of numbers`.
    """

    rank: int
    """Position in the communicator."""
    nodes: Sequence[int]
    """Number of the node of each position."""
    volumes: dict[str, Volume] = field(default_factory=dict)

    def add(self, name: str, rows: Sequence[int], row_bytes: int) -> Volume:
        """Count one call that sends `rows[peer]` rows of `row_bytes` bytes to each peer; returns where it counts."""
        volume = self.volumes.setdefault(name, Volume())
        volume.calls += 1
        for peer, count in enumerate(rows):
            if peer == self.rank:
                continue
            if self.nodes[peer] == self.nodes[self.rank]:
                volume.intra_node_rows += count
                volume.intra_node_bytes += count * row_bytes
            else:
                volume.inter_node_rows += count
                volume.inter_node_bytes += count * row_bytes
        return volume

    def snapshot(self) -> dict[str, Volume]:
        """A copy of the volumes that later calls do not change."""
        return {name: replace(volume) for name, volume in self.volumes.items()}

    def reset(self) -> None:
        """Forget what was counted."""
        self.volumes.clear()
