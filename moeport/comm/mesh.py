"""The ranks of a job as copies x parts: each copy of the experts is divided among ranks that follow each other.

Rank r holds part r % expert of copy r // expert. All else of the model every rank holds, and every rank trains on its
own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeport.comm.communicator import Communicator
from moeport.comm.single import SingleProcess
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import Topology
from moeport.core.weights import Box
from moeport.errors import UserError


class Mesh:
    """Who shares what; every rank of the job makes one.

    Args:
        world: all ranks.
        expert: ranks that share one copy of the experts; divides the number of ranks.

    Raises UserError if the ranks that share a copy are not as many on each of their nodes.
    """

    def __init__(self, world: Communicator, expert: int):
        ranks = range(world.size)
        self.world = world
        self.experts = _group(world, [ranks[first : first + expert] for first in ranks[::expert]])
        """The ranks that share the experts of this rank's copy."""
        self.copies = _group(world, [ranks[part::expert] for part in range(expert)])
        """The ranks that hold the same experts."""
        self.topology = _topology(self.experts, len(set(world.nodes)))

    def box(self, spec: ParameterSpec) -> Box:
        """The part of a parameter that this rank holds, with its optimiser state."""
        whole = Box.whole(spec.shape)
        if not spec.is_expert:
            return whole
        size = spec.shape[0] // self.experts.size
        return whole.rows(self.experts.rank * size, size)

    def whole(self, spec: ParameterSpec, local: np.ndarray) -> np.ndarray:
        """The whole parameter from what each rank holds; every rank calls it."""
        if not spec.is_expert or self.experts.size == 1:
            return local
        ops = self.world.ops
        return ops.to_numpy(self.experts.all_gather(ops.from_numpy(local))).reshape(-1, *local.shape[1:])

    def mean(self, x: Array) -> Array:
        """The mean of an array over all ranks; each rank gets it."""
        return self.world.all_reduce(x) * self.world.ops.constant_like(1.0 / self.world.size, x)


def single_mesh(ops: Ops) -> Mesh:
    """The mesh of a process by itself."""
    return Mesh(SingleProcess(ops), 1)


def _group(world: Communicator, partition: Sequence[Sequence[int]]) -> Communicator:
    if len(partition) == 1:
        return world
    return SingleProcess(world.ops) if len(partition[0]) == 1 else world.group(partition)


def _topology(experts: Communicator, job_nodes: int) -> Topology:
    """Nodes that the experts of one copy are spread over, counted from 0, in a job of this many nodes."""
    nodes = list(dict.fromkeys(experts.nodes))
    if experts.nodes != tuple(np.repeat(nodes, experts.size // len(nodes))):
        raise UserError(
            f"parallelism.expert: the ranks {list(experts.ranks)} that share a copy of the experts are on nodes "
            f"{list(experts.nodes)}; expected as many on each of these nodes, node after node: let the ranks of a node "
            f"divide {experts.size}, or be a multiple of it"
        )
    return Topology(len(nodes), nodes.index(experts.nodes[experts.rank]), job_nodes)
