"""Step time and memory of a model on a cluster: which placement of the experts, and which all-to-all.

What the all-to-all of experts takes follows from `moeport.plan.cost`; all else here is an estimate, with its formula
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.comm.communicator import ITEM_BYTES
from moeport.comm.exchange import EXCHANGES, loads
from moeport.comm.load import Demand, Layout, Load, Routes, Sharing, ranks_sharing
from moeport.config.schema import Config
from moeport.errors import UserError
from moeport.model.build import build_model
from moeport.plan.compute import Speed, Step, Work
from moeport.plan.cost import Cost, Links
from moeport.plan.overlap import overlapped

RoutesOf = Callable[[Layout, Demand], Routes]
CHUNKS = (1, 2, 4, 8)
"""Numbers of chunks that are tried."""
CAUSES = {
    "latency": "the number of messages",
    "intra": "the links inside a node",
    "inter": "the link between nodes",
    "copies": "copying rows",
}


@dataclass(frozen=True)
class Cluster:
    """Nodes, their ranks and links."""

    nodes: int
    ranks_per_node: int
    links: Links
    shares: Sharing = "nothing"

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.ranks_per_node

    @property
    def sharing(self) -> int:
        """Ranks that share one processor."""
        return ranks_sharing(self.shares, Layout(self.nodes, self.ranks_per_node))

    def group(self, expert: int) -> Layout:
        """Consecutive ranks that share one copy of the experts."""
        per_node = min(expert, self.ranks_per_node)
        return Layout(expert // per_node, per_node)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    moments: float
    """Of AdamW, two for each parameter."""
    gathered: float
    """Whole parameters and gradients of the largest block while it computes, where they are sharded."""
    activations: float
    """An estimate, see `activation_bytes`."""

    @property
    def total(self) -> float:
        """Bytes."""
        return self.parameters + self.gradients + self.moments + self.gathered + self.activations


@dataclass(frozen=True)
class Placement:
    """A model on a cluster with experts divided among groups of so many ranks."""

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
    reason: str

    @property
    def step(self) -> float:
        """Seconds; communication alone where compute is not known."""
        return self.exchange + self.gradients + (self.compute or 0.0)


@dataclass(frozen=True)
class Way:
    """An all-to-all of one layer."""

    algorithm: str
    chunks: int
    seconds: float
    """That it adds to what experts compute, in all passes."""
    hidden: float
    """Share of its time in one chunk that it does not add."""


def exchange_costs(layout: Layout, demand: Demand, routes: Routes, links: Links, sharing: int) -> dict[str, Cost]:
    """Time of one exchange by each algorithm."""
    return {name: links.cost(loads(name, layout, demand, routes, sharing)) for name in EXCHANGES}


def fastest(costs: Mapping[str, Cost]) -> str:
    """The algorithm of least time; of equal ones the first."""
    return min(costs, key=lambda name: costs[name].total)


def reason(
    layout: Layout, demand: Demand, routes: Routes, costs: Mapping[str, Cost], ways: Sequence[Way] | None = None
) -> str:
    """Why the fastest algorithm is the fastest, in a sentence.

    Args:
        layout: ranks and nodes.
        demand: tokens and experts.
        routes: its rows.
        costs: by algorithm, in one chunk.
        ways: of those to compare, each with its best number of chunks; default: all in one chunk.
    """
    ways = ways or [Way(name, 1, cost.total, 0.0) for name, cost in costs.items()]
    way = min(ways, key=lambda each: each.seconds)
    best = way.algorithm
    tokens = demand.tokens * layout.ranks
    flat, dedup = (moved.sent_inter_W.sum() / tokens for moved in (routes.flat, routes.tokens))
    choices = "choice" if demand.top_k == 1 else "choices"
    if layout.nodes == 1 and best == "node_dedup":
        there, once = (moved.sent_intra_W.sum() / tokens for moved in (routes.flat, routes.inside_tokens))
        why = f"{once:.1f} rows a token go to other ranks of the node instead of {there:.1f}"
    elif layout.nodes == 1:
        why = "the experts of a copy are on one node, and no token crosses between nodes"
    elif best == "node_dedup":
        why = f"{dedup:.1f} rows a token cross between nodes instead of {flat:.1f} of {demand.top_k} {choices}"
    elif best == "hierarchical":
        messages = layout.nodes + layout.ranks_per_node - 2
        why = f"{messages} messages of a rank in the way there instead of {layout.ranks - 1}"
    else:
        why = (
            f"{flat:.1f} of {demand.top_k} {choices} a token cross between nodes, and node_dedup's {dedup:.1f} rows "
            "do not make up for its other stages"
        )
    cost = costs[best]
    cause = max(CAUSES, key=lambda name: getattr(cost, name))
    said = [f"{best}: {why}", f"{getattr(cost, cause) / cost.total:.0%} of its time is {CAUSES[cause]}"]
    if way.hidden > 0:
        said.append(f"in {way.chunks} chunks {way.hidden:.0%} of it passes while experts compute or others travel")
    compared = [
        f"{each.algorithm} takes {each.seconds / way.seconds:.2f} times as long" for each in ways if each != way
    ]
    return "; ".join([*said, ", ".join(compared)])


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
        self.sizes = Sizes.of(config, vocab_size)
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
        """Experts divided among groups of so many ranks, with the fastest of some algorithms and numbers of chunks."""
        cluster, training, moe = self.cluster, self.config.training, self.config.model.moe
        layout = cluster.group(expert)
        forward, both = (
            Demand(self.tokens, moe.router.experts_per_token, moe.num_experts, self.sizes.row_bytes, is_both)
            for is_both in (False, True)
        )
        routes = self.routes_of(layout, forward)
        busiest = _busiest(routes.flat.received, min(cluster.sharing, layout.ranks)) if expert > 1 else 1.0
        costs: dict[str, Cost] = {}
        ways: list[Way] = []
        if expert > 1:
            costs = exchange_costs(layout, both, routes, cluster.links, cluster.sharing)
            experts = speed.flop * self.expert_flops * busiest / max(1, self.exchanges) if speed else 0.0
            for name in algorithms:
                passes = [(loads(name, layout, both, routes, cluster.sharing), experts)]
                if training.activation_checkpointing:
                    passes.append((loads(name, layout, forward, routes, cluster.sharing), experts / 3))
                ways.append(_fastest_chunks(name, cluster, passes, chunks))
        best = min(ways, key=lambda way: way.seconds, default=None)
        return Placement(
            expert=expert,
            nodes=layout.nodes,
            algorithm=best.algorithm if best else None,
            chunks=best.chunks if best else 1,
            costs=costs,
            exchange=best.seconds * self.exchanges if best else 0.0,
            gradients=gradient_seconds(cluster, expert, self.sizes, training.gradient_accumulation),
            compute=speed.seconds(self.work(expert, busiest)) if speed else None,
            memory=memory(self.config, self.sizes, cluster.ranks, expert, self.tokens),
            reason=reason(layout, both, routes, costs, ways) if best else "every rank has all experts: no rows move",
        )

    def place_of_config(self, speed: Speed | None = None) -> Placement:
        """The placement and all-to-all that the config says; for `auto` the fastest."""
        comm = self.config.comm
        algorithms = tuple(EXCHANGES) if comm.algorithm == "auto" else (comm.algorithm,)
        chunks = CHUNKS if comm.chunks == "auto" else (comm.chunks,)
        return self.place(self.config.parallelism.expert, algorithms, chunks, speed)

    def measured(self, seconds: float) -> Step:
        """A step of the config, which took so long on this cluster."""
        placed = self.place_of_config()
        return Step(self.work(placed.expert), placed.exchange + placed.gradients, seconds)

    def work(self, expert: int, busiest: float = 1.0) -> Work:
        """Of the ranks that share a processor, with experts divided among so many ranks.

        Args:
            expert: ranks that share one copy of the experts.
            busiest: rows of the experts on the busiest processor over their mean.
        """
        sizes, ranks, each = self.sizes, self.cluster.ranks, self.cluster.sharing
        dense_copies, expert_copies = (ranks, ranks // expert) if sizes.shard else (1, 1)
        parameters = sizes.dense_total / dense_copies + sizes.expert_total / expert / expert_copies
        passes = self.config.model.moe.router.passes * self.config.training.gradient_accumulation
        return Work(
            flops=self.flops + self.expert_flops * (busiest - 1),
            parameters=each * parameters,
            blocks=float(each * passes * self.config.model.num_layers),
        )


def _fastest_chunks(
    algorithm: str, cluster: Cluster, passes: Sequence[tuple[Sequence[Load], float]], chunks: Sequence[int]
) -> Way:
    """Of the exchanges of a layer, each with the seconds that experts compute in it."""
    alone = sum(cluster.links.cost(list(each)).total for each, _ in passes)
    ways = []
    for count in chunks:
        seconds = sum(
            overlapped(cluster.links, each, experts, count, cluster.sharing > 1) - experts for each, experts in passes
        )
        ways.append(Way(algorithm, count, seconds, 1 - seconds / alone if count > 1 else 0.0))
    return min(ways, key=lambda way: way.seconds)


def _busiest(received_W: np.ndarray, together: int) -> float:
    """Rows of the processor with most over their mean, where so many ranks share one."""
    received = received_W.reshape(-1, together).sum(1)
    return float(received.max() / received.mean())


@dataclass(frozen=True)
class Sizes:
    """Trained parameters of a model, and bytes of what is made of them."""

    dense_total: int
    """All but the routed experts'."""
    expert_total: int
    dense_block: int
    """Of the largest block."""
    expert_block: int
    parameter_bytes: int
    """Of a parameter, a gradient or a moment."""
    item_bytes: int
    """Of a number in the compute type."""
    row_bytes: int
    """Of one token in the compute type."""
    shard: bool
    """Whether ranks that hold copies divide them (FSDP)."""

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Sizes:
        """Counted from the shapes of the model. Compute type `auto` counts as bfloat16."""
        specs = build_model(config.model, config.data, vocab_size).parameter_specs()
        blocks: dict[tuple[str, bool], int] = {}
        totals = {True: 0, False: 0}
        for spec in specs:
            if spec.trainable:
                totals[spec.is_expert] += spec.size
                if spec.name.startswith("layers."):
                    key = spec.name.split(".")[1], spec.is_expert
                    blocks[key] = blocks.get(key, 0) + spec.size
        dtype = config.backend.dtype
        item_bytes = 2 if dtype == "auto" else ITEM_BYTES[dtype]
        shard = config.parallelism.shard
        return cls(
            dense_total=totals[False],
            expert_total=totals[True],
            dense_block=max(size for (_, is_expert), size in blocks.items() if not is_expert),
            expert_block=max((size for (_, is_expert), size in blocks.items() if is_expert), default=0),
            parameter_bytes=8 if dtype == "float64" else 4,
            item_bytes=item_bytes,
            row_bytes=config.model.d_model * item_bytes,
            shard=config.backend.name == "torch" if shard is None else shard,
        )


def gradient_seconds(cluster: Cluster, expert: int, sizes: Sizes, micro_batches: int) -> float:
    """Time to add the gradients of copies and, where they are sharded, to gather parameters. An estimate.

    A ring of n ranks in the order of the nodes carries (n - 1) / n of the bytes past each rank for one gather or one
    reduce-scatter. An all-reduce is two of those; FSDP gathers in both passes and scatters, each micro-batch. The
    experts have a ring for each part, and a link of a node carries those of all its ranks. Latency is left out.
    """
    copies, parts = cluster.ranks // expert, min(expert, cluster.ranks_per_node)
    turns = (3 * micro_batches if sizes.shard else 2) * sizes.parameter_bytes
    dense = turns * sizes.dense_total * (cluster.ranks - 1) / cluster.ranks
    experts = turns * sizes.expert_total / expert * (copies - 1) / copies
    intra = (dense + experts) * cluster.sharing / cluster.links.intra.bandwidth if cluster.ranks > 1 else 0.0
    inter = (dense + parts * experts) / cluster.links.inter.bandwidth if cluster.nodes > 1 else 0.0
    return max(intra, inter)


def memory(config: Config, sizes: Sizes, ranks: int, expert: int, tokens: int) -> Memory:
    """Bytes of one rank: parameters, gradients and two moments of AdamW in the parameters' type, and activations."""
    dense_copies, expert_copies = (ranks, ranks // expert) if sizes.shard else (1, 1)
    held = sizes.parameter_bytes * (sizes.dense_total / dense_copies + sizes.expert_total / expert / expert_copies)
    block = sizes.parameter_bytes * (sizes.dense_block + sizes.expert_block / expert)
    gathered = 2.0 * block if sizes.shard and ranks > 1 else 0.0
    return Memory(held, held, 2 * held, gathered, activation_bytes(config, sizes.item_bytes) * tokens)


def activation_bytes(config: Config, item_bytes: int) -> float:
    """Bytes that a token leaves for the backward pass; an estimate.

    A block keeps its input and both normed ones (3 D), queries, keys and values before and after the rotation and the
    attention's output, and for each expert of the token, shared ones too, its row (2 D: in and out) and hidden values
    (3 F of SwiGLU, 2 F of GELU). With checkpointing a block keeps its input, and one block all.
    """
    model, moe = config.model, config.model.moe
    heads = model.head_dim * (3 * model.num_heads + 4 * model.num_kv_heads)
    hidden = 3 if moe.activation == "swiglu" else 2
    experts = moe.router.sub_layers * (moe.router.experts_per_token + moe.num_shared_experts)
    per_moe = experts * (2 * model.d_model + hidden * moe.expert_hidden) + hidden * moe.residual_hidden
    per_dense = 2 * model.d_model + hidden * model.dense_width
    moe_layers, layers = len(model.moe_layers), model.num_layers
    block = 3 * model.d_model + heads
    total = layers * block + moe_layers * per_moe + (layers - moe_layers) * per_dense
    if config.training.activation_checkpointing:
        total = layers * model.d_model + block + max(per_moe, per_dense)
    return float(item_bytes * total)


def _placements(cluster: Cluster, num_experts: int) -> list[int]:
    """Sizes of groups that divide ranks and experts and fill their nodes or divide one."""
    return [
        expert
        for expert in range(1, min(cluster.ranks, num_experts) + 1)
        if cluster.ranks % expert == 0
        and num_experts % expert == 0
        and (cluster.ranks_per_node % expert == 0 or expert % cluster.ranks_per_node == 0)
    ]
