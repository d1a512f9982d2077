"""Seconds that links take for the load of an exchange.

Time is latency and bandwidth, the alpha-beta model (Hockney 1994), of three link classes: copies inside a rank, links
inside a node, and the link of a node to the others, which its ranks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.comm.load import Layout, Load, Sharing, ranks_sharing


@dataclass(frozen=True)
class Link:
    """One link class."""

    latency: float
    """Seconds per message; for copies, seconds per row."""
    bandwidth: float
    """Bytes per second; between nodes, of the whole link of a node in one direction."""
    pair_bandwidth: float = np.inf
    """Between nodes: bytes per second of one pair of ranks; the time adds to that of the link. Some libraries, gloo
    among them, send in one direction of a connection at a time, so that few pairs leave the link idle."""
    meeting_bandwidth: float = np.inf
    """Between nodes: bytes per second of the time that is lost where several nodes send to one (incast)."""

    def at(self, bandwidth: float) -> Link:
        """The same link and library with another bandwidth."""
        faster = bandwidth / self.bandwidth if np.isfinite(self.bandwidth) else np.inf
        return Link(self.latency, bandwidth, self.pair_bandwidth * faster, self.meeting_bandwidth * faster)


@dataclass(frozen=True)
class Cost:
    """Seconds, by cause."""

    latency: float
    intra: float
    inter: float
    copies: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.latency + self.intra + self.inter + self.copies


@dataclass(frozen=True)
class Links:
    """The links of a cluster."""

    intra: Link
    inter: Link
    copies: Link = Link(0.0, np.inf)
    """Default: copies take no time."""

    def transfers(self, load: Load) -> tuple[float, float]:
        """Seconds of the bytes inside nodes and of those between them."""
        inter = self.inter
        between = load.inter_bytes / inter.bandwidth
        between += load.pair_bytes / inter.pair_bandwidth + load.meeting_bytes / inter.meeting_bandwidth
        return load.intra_bytes / self.intra.bandwidth, between

    def cost(self, loads: Sequence[Load]) -> Cost:
        """Time of stages that follow each other. Inside a stage bytes inside nodes and between them travel at once, so
        that the slower of the two counts.
        """
        latency = intra = inter = copies = 0.0
        for load in loads:
            latency += load.intra_messages * self.intra.latency + load.inter_messages * self.inter.latency
            inside, between = self.transfers(load)
            intra, inter = (intra, inter + between) if between > inside else (intra + inside, inter)
            copies += load.copied_rows * self.copies.latency + load.copied_bytes / self.copies.bandwidth
        return Cost(latency, intra, inter, copies)


@dataclass(frozen=True)
class Cluster:
    """Nodes, their ranks and links."""

    nodes: int
    ranks_per_node: int
    links: Links
    shares: Sharing = "nothing"

    @property
    def ranks(self) -> int:
        """Number of ranks W."""
        return self.nodes * self.ranks_per_node

    @property
    def sharing(self) -> int:
        """Ranks that share one processor."""
        return ranks_sharing(self.shares, Layout(self.nodes, self.ranks_per_node))

    def group(self, expert: int) -> Layout:
        """Consecutive ranks that share one copy of the experts."""
        per_node = min(expert, self.ranks_per_node)
        return Layout(expert // per_node, per_node)
