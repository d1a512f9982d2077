"""Step time and memory of a model on a cluster: which placement of the experts, and which all-to-all.

What the all-to-all of experts takes follows from `moeport.plan.layer`; all else here is an estimate, with its formula
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.comm.load import Demand, Layout, Routes, Stages
from moeport.config.schema import Config
from moeport.errors import UserError
from moeport.model.build import build_model
from moeport.model.memory import Memory, ModelSizes, memory
from moeport.plan.compute import MeasuredStep, Speed, Work
from moeport.plan.cost import Cluster, Cost
from moeport.plan.layer import LayerExchange, LayerPass, Reason, fastest_exchange

RoutesOf = Callable[[Layout, Demand], Routes]
CHUNKS = (1, 2, 4, 8)
"""Numbers of chunks that are tried."""


@dataclass(frozen=True)
class Placement:
    """A model on a cluster, with the experts divided among groups of `expert` ranks."""

    expert: int
    """Ranks that share one copy of the experts: parallelism.expert."""
    nodes: int
    """Of one such group."""
    algorithm: str | None
    """The fastest all-to-all: comm.algorithm; None where no rows move."""
    chunks: int
    """In which tokens travel: comm.chunks."""
    costs: Mapping[str, Cost]
    """Of one layer's forward and backward pass in one chunk, by algorithm."""
    exchange: float
    """Seconds a step that its all-to-alls add to what experts compute meanwhile."""
    gradients: float
    """Seconds a step that sharded or copied parameters take."""
    compute: float | None
    """Seconds a step; None: not known."""
    memory: Memory
    reason: Reason | None
    """None where no rows move."""

    @property
    def step(self) -> float:
        """Seconds; communication alone where compute is not known."""
        return self.exchange + self.gradients + (self.compute or 0.0)


class Planner:
    """A model and its batch on a cluster.

    Args:
        config: model, batch and precision.
        vocab_size: of the tokenizer.
        cluster: ranks and links.
        routes_of: rows of an exchange.

    Raises UserError for a batch that does not divide among the ranks.
    """

    def __init__(self, config: Config, vocab_size: int, cluster: Cluster, routes_of: RoutesOf):
        training, router = config.training, config.model.moe.router
        parts = cluster.ranks * training.gradient_accumulation
        if training.batch_size % parts:
            raise UserError(
                f"training.batch_size: {training.batch_size} sequences do not divide among {cluster.ranks} ranks x "
                f"{training.gradient_accumulation} micro-batches (training.gradient_accumulation); expected a multiple "
                f"of {parts}: add --set training.batch_size={-(-training.batch_size // parts) * parts}"
            )
        self.config, self.cluster, self.routes_of = config, cluster, routes_of
        self.sizes = ModelSizes.of(config, vocab_size)
        self.tokens = training.batch_size // parts * config.data.tokens_per_sequence
        """Of a rank's micro-batch."""
        model = build_model(config.model, config.data, vocab_size)
        self.exchanges = len(model.moe_layers) * router.passes * training.gradient_accumulation
        """Of a step."""
        flops_token = model.training_flops_per_token(config.data.tokens_per_sequence)
        tokens = self.tokens * training.gradient_accumulation * cluster.sharing
        self.flops = flops_token * tokens
        """Of the ranks that share a processor, in a step."""
        used = self.sizes.expert_total / config.model.moe.num_experts * router.experts_per_token
        self.expert_flops = 6 * router.passes * used * tokens
        """Of these, those of routed experts."""

    def places(self, speed: Speed | None = None) -> list[Placement]:
        """Every placement of the experts that the cluster has room for with its fastest all-to-all, the fastest first.

        Args:
            speed: at which ranks compute; without it no chunks are tried, as it is not known what they could hide.
        """
        chunks = CHUNKS if speed else (1,)
        experts = _placements(self.cluster, self.config.model.moe.num_experts)
        found = [self.place(expert, tuple(EXCHANGES), chunks, speed) for expert in experts]
        return sorted(found, key=lambda placement: placement.step)

    def place(
        self, expert: int, algorithms: Sequence[str], chunks: Sequence[int] = (1,), speed: Speed | None = None
    ) -> Placement:
        """The placement with the experts divided among groups of `expert` ranks, and the fastest of the given
        algorithms and numbers of chunks.
        """
        layout = self.cluster.group(expert)
        routes = self.routes_of(layout, self._demand(backward=False))
        busiest = _busiest(routes.flat.received, min(self.cluster.sharing, layout.ranks)) if expert > 1 else 1.0
        found: LayerExchange | None = None
        if expert > 1:
            passes = self._passes(layout, routes, speed.flop * busiest if speed else 0.0)
            found = fastest_exchange(self.cluster, passes, algorithms, chunks)
        accumulation = self.config.training.gradient_accumulation
        return Placement(
            expert=expert,
            nodes=layout.nodes,
            algorithm=found.best.algorithm if found else None,
            chunks=found.best.chunks if found else 1,
            costs=found.costs if found else {},
            exchange=found.best.seconds * self.exchanges if found else 0.0,
            gradients=gradient_seconds(self.cluster, expert, self.sizes, accumulation),
            compute=speed.seconds(self.work(expert, busiest)) if speed else None,
            memory=memory(self.config, self.sizes, self.cluster.ranks, expert, self.tokens),
            reason=found.reason if found else None,
        )

    def _demand(self, backward: bool) -> Demand:
        moe = self.config.model.moe
        return Demand(self.tokens, moe.router.experts_per_token, moe.num_experts, self.sizes.row_bytes, backward)

    def _passes(self, layout: Layout, routes: Routes, flop_seconds: float) -> list[LayerPass]:
        """Those of a layer: forward and backward, and the forward pass again where blocks are recomputed."""
        experts = flop_seconds * self.expert_flops / max(1, self.exchanges)
        both, forward = (Stages(layout, self._demand(again), routes, self.cluster.sharing) for again in (True, False))
        passes = [LayerPass(both, experts)]
        if self.config.training.activation_checkpointing:
            passes.append(LayerPass(forward, experts / 3))
        return passes

    def place_of_config(self, speed: Speed | None = None) -> Placement:
        """The placement and all-to-all that the config says; for `auto` the fastest."""
        comm = self.config.comm
        algorithms = tuple(EXCHANGES) if comm.algorithm == "auto" else (comm.algorithm,)
        chunks = CHUNKS if comm.chunks == "auto" else (comm.chunks,)
        return self.place(self.config.parallelism.expert, algorithms, chunks, speed)

    def measured(self, seconds: float) -> MeasuredStep:
        """A step of the config that took `seconds` on this cluster."""
        placed = self.place_of_config()
        return MeasuredStep(self.work(placed.expert), placed.exchange + placed.gradients, seconds)

    def work(self, expert: int, busiest: float = 1.0) -> Work:
        """Work of the ranks that share a processor.

        Args:
            expert: ranks that share one copy of the experts.
            busiest: rows of the experts on the busiest processor over their mean.
        """
        sizes, ranks, each = self.sizes, self.cluster.ranks, self.cluster.sharing
        dense_copies, expert_copies = (ranks, ranks // expert) if "moments" in sizes.sharded else (1, 1)
        parameters = sizes.dense_total / dense_copies + sizes.expert_total / expert / expert_copies
        passes = self.config.model.moe.router.passes * self.config.training.gradient_accumulation
        return Work(
            flops=self.flops + self.expert_flops * (busiest - 1),
            parameters=each * parameters,
            blocks=float(each * passes * self.config.model.num_layers),
        )


def _busiest(received_W: np.ndarray, together: int) -> float:
    """Rows of the busiest processor over the mean, where `together` ranks share one."""
    received = received_W.reshape(-1, together).sum(1)
    return float(received.max() / received.mean())


def gradient_seconds(cluster: Cluster, expert: int, sizes: ModelSizes, micro_batches: int) -> float:
    """Time to add the gradients of copies and, where they are sharded, to gather parameters. An estimate.

    A ring of n ranks in the order of the nodes carries (n - 1) / n of the bytes past each rank for one gather or one
    reduce-scatter. An all-reduce is two of those; FSDP gathers in both passes of each micro-batch, and scatters once.
    The experts have a ring for each part, and a link of a node carries those of all its ranks. Latency is left out.
    """
    copies, parts = cluster.ranks // expert, min(expert, cluster.ranks_per_node)
    turns = (2 * micro_batches + 1 if "parameters" in sizes.sharded else 2) * sizes.parameter_bytes
    dense = turns * sizes.dense_total * (cluster.ranks - 1) / cluster.ranks
    experts = turns * sizes.expert_total / expert * (copies - 1) / copies
    intra = (dense + experts) * cluster.sharing / cluster.links.intra.bandwidth if cluster.ranks > 1 else 0.0
    inter = (dense + parts * experts) / cluster.links.inter.bandwidth if cluster.nodes > 1 else 0.0
    return max(intra, inter)


def _placements(cluster: Cluster, num_experts: int) -> list[int]:
    """Sizes of groups that divide ranks and experts and fill their nodes or divide one."""
    return [
        expert
        for expert in range(1, min(cluster.ranks, num_experts) + 1)
        if cluster.ranks % expert == 0
        and num_experts % expert == 0
        and (cluster.ranks_per_node % expert == 0 or expert % cluster.ranks_per_node == 0)
    ]
