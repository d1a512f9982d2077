"""Whether what ranks need fits the memory of an accelerator and of a node, as far as these are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeport.errors import UserError
from moeport.model.memory import Memory, fits, gib, memory_text
from moeport.plan.planner import Placement


@dataclass(frozen=True)
class Limits:
    """Memory of the machines that are planned for."""

    ranks_per_node: int
    on_cpu: bool
    """Whether processors compute, in the memory of their node."""
    device: float = math.inf
    """Bytes of an accelerator; infinite: not known."""
    host: float = math.inf
    """Bytes of a node; infinite: not known."""

    def holds(self, memory: Memory) -> bool:
        """Whether a node has room for its ranks, and each accelerator for its rank."""
        on_device = self.on_cpu or memory.total <= self.device
        return on_device and self.on_node(memory) <= self.host

    def on_node(self, memory: Memory) -> float:
        """Bytes that the ranks of a node need on the host."""
        return self.ranks_per_node * memory.on_host(self.on_cpu)


def fitting(found: Sequence[Placement], limits: Limits) -> list[Placement]:
    """The placements that fit, in their order.

    Raises UserError if none does, with what the smallest needs and what to change.
    """
    fit = [placement for placement in found if limits.holds(placement.memory)]
    if fit:
        return fit
    least = min((placement.memory for placement in found), key=lambda memory: memory.total)
    has = [f"an accelerator has {gib(limits.device)}"] if not limits.on_cpu and math.isfinite(limits.device) else []
    has += [f"the ranks of a node {gib(limits.on_node(least))}, and it has {gib(limits.host)}"] * math.isfinite(
        limits.host
    )
    raise UserError(
        f"model: no placement fits: the smallest needs {memory_text(least)} per rank; {'; '.join(has)}; expected "
        "more nodes, smaller micro-batches (training.gradient_accumulation), training.activation_checkpointing, "
        "parallelism.shard, or smaller sizes"
    )


def memory_lines(placement: Placement, limits: Limits) -> list[str]:
    """What a rank needs of a placement, and whether that fits."""
    memory, need = placement.memory, limits.on_node(placement.memory)
    nodes = "1 rank" if limits.ranks_per_node == 1 else f"{limits.ranks_per_node} ranks"
    host = gib(need) if math.isinf(limits.host) else fits(need, limits.host, "node")
    device = "" if limits.on_cpu or math.isinf(limits.device) else f"; {fits(memory.total, limits.device, 'device')}"
    return [
        f"Memory per rank with parallelism.expert = {placement.expert}: {memory_text(memory)}{device}.",
        f"Host of {nodes} (--ranks-per-node): {host}; per rank {gib(memory.program)} for the program and "
        f"{gib(memory.saved)} for a copy of what it saves.",
    ]
