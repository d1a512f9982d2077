"""A whole MoE layer whose experts are divided among the ranks, and the same layer with all experts in one process.

Shape suffixes as in `moeport.core.ops`; e: experts of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.backends.base import Backend
from moeport.bench.layer_run import LayerRun
from moeport.bench.stand_ins import FixedChoices, LocalExperts
from moeport.comm.communicator import ITEM_BYTES, Communicator
from moeport.comm.exchange import EXCHANGES, ExpertExchange
from moeport.comm.mesh import Mesh
from moeport.config.model import MoEConfig
from moeport.config.schema import Config
from moeport.core.array import Array
from moeport.core.parameters import InitialWeights, ParameterSpec, generator
from moeport.core.routing import RouterContext
from moeport.core.weights import Box
from moeport.errors import UserError
from moeport.model.auto_exchange import FastestExchange, fastest
from moeport.model.moe import MoELayer
from moeport.plan.traffic import expert_choices

LOCAL = "local"
"""The layer without an all-to-all."""
AUTO = "auto"
"""What `comm.algorithm: auto` chooses for the size."""
ALGORITHMS = (LOCAL, *EXCHANGES)
"""The algorithms that are measured by default."""
VOCABULARY = 32768
"""Number of token ids, for routers that look at them, if the config does not set it."""


@dataclass(frozen=True)
class LayerTraffic:
    """How tokens choose experts."""

    kind: str
    """`router`: as the layer's router does. Otherwise as in `expert_choices`, with the gates of the router."""
    backward: bool
    """Run forward and backward pass together."""

    @property
    def is_forced(self) -> bool:
        """Whether the choices are not the router's."""
        return self.kind != "router"

    def check(self, config: MoEConfig) -> None:
        """Raises UserError if the layer's router cannot take these choices."""
        if not self.is_forced:
            return
        if config.router.fixed_load:
            raise UserError(f"--traffic {self.kind}: with router {config.router.name} experts choose; expected router")
        try:
            self.choices(config, 1, rank=0, size=1, node=0, nodes=1)
        except UserError as error:
            raise UserError(f"{error}; or router, for the choices of the layer's own router") from error

    def choices(self, config: MoEConfig, tokens: int, *, rank: int, size: int, node: int, nodes: int) -> np.ndarray:
        """Experts of each token, (T, K); see `expert_choices`."""
        top_k = config.router.experts_per_token
        return expert_choices(
            self.kind, tokens, config.num_experts, top_k, rank=rank, size=size, node=node, nodes=nodes
        )


class LayerBench:
    """One layer on all ranks, for any number of tokens. Every rank must create it and call its methods.

    Args:
        config: shapes of the layer.
        backend: for operations and gradients.
        communicator: all ranks, which divide the experts among themselves.
        algorithms: names in ALGORITHMS, or AUTO.
        chunks: numbers of chunks to try with each algorithm; with several, AUTO tries its own.
        traffic: how tokens choose experts.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        communicator: Communicator,
        algorithms: Sequence[str],
        chunks: Sequence[int],
        traffic: LayerTraffic,
    ):
        self.model = model = config.model
        self.backend, self.traffic = backend, traffic
        self.mesh = Mesh(communicator, communicator.size)
        self.vocabulary = model.vocab_size or VOCABULARY
        self.specs = self._layer(None).parameter_specs()
        local = model.moe.num_experts // communicator.size
        self.exchanges: list[tuple[str, ExpertExchange | LocalExperts]] = []
        for name in algorithms:
            if name == LOCAL:
                self.exchanges.append((name, LocalExperts(local)))
            elif name != AUTO:
                self.exchanges += [(name, self._exchange(name, count)) for count in chunks]
        trial = {"algorithm": "auto", "chunks": chunks[0] if len(chunks) == 1 else "auto"}
        self.trial = config.model_copy(update={"comm": config.comm.model_copy(update=trial)})
        self.includes_auto = AUTO in algorithms
        self.choice: tuple[FastestExchange, ExpertExchange] | None = None
        """The choice of AUTO for the size prepared last."""
        self.params = self._parameters(range(communicator.rank * local, (communicator.rank + 1) * local))

    @property
    def communicators(self) -> list[Communicator]:
        """All communicators that carry data, that of all ranks first."""
        carrying = [each for _, exchange in self._all() for each in exchange.communicators]
        return list(dict.fromkeys([self.mesh.world, *carrying]))

    def prepare(self, size: int, check: bool) -> list[LayerRun]:
        """Every algorithm with `size` bytes of tokens per rank, rounded down to whole tokens, at least one.

        Args:
            size: bytes.
            check: also compute the reference, for which each rank holds all experts.
        """
        width, dtype = self.model.d_model, self.backend.dtype
        row_bytes = width * ITEM_BYTES[dtype]
        tokens = max(1, size // row_bytes)
        inputs = self._inputs(tokens)
        reference = self._reference(inputs) if check else None
        if self.includes_auto:
            self.choice = self._choose(tokens)
        return [
            LayerRun(
                algorithm=name,
                chunks=exchange.chunks,
                tokens=tokens,
                bytes=tokens * row_bytes,
                type=dtype,
                run=self._passes(self._layer(exchange), self.params, inputs),
                reference=None if name == LOCAL else reference,
                ops=self.backend.ops,
            )
            for name, exchange in self._all()
        ]

    def _all(self) -> list[tuple[str, ExpertExchange | LocalExperts]]:
        return self.exchanges + ([(AUTO, self.choice[1])] if self.choice else [])

    def _exchange(self, name: str, chunks: int) -> ExpertExchange:
        return EXCHANGES[name](self.mesh.world, self.model.moe.num_experts, chunks)

    def _choose(self, tokens: int) -> tuple[FastestExchange, ExpertExchange]:
        backend, moe = self.backend, self.model.moe
        top_k = moe.router.experts_per_token
        choice = fastest(self.mesh, self.trial, tokens, top_k, backend.dtype, backend.value_and_grad)
        return choice, self._exchange(choice.algorithm, choice.chunks)

    def _layer(self, exchange: ExpertExchange | LocalExperts | None) -> MoELayer:
        model = self.model
        layer = MoELayer(model.moe, model.d_model, model.init_std, model.init_std, self.vocabulary)
        layer.exchange = exchange
        if self.mesh.world.size > 1:
            layer.mean_over_ranks = self.mesh.mean
        return layer

    def _parameters(self, experts: range) -> dict[str, Array]:
        """Initial values; of the routed experts, only those of `experts`."""
        kind = self.backend.parameter_dtype
        return {spec.name: self.backend.ops.from_numpy(_initial(spec, experts).astype(kind)) for spec in self.specs}

    def _inputs(self, tokens: int) -> _Inputs:
        ops, world, kind = self.backend.ops, self.mesh.world, self.backend.parameter_dtype
        random = generator(0, "bench moe", world.rank)
        x_TD, mixing_TD = random.standard_normal((2, tokens, self.model.d_model)).astype(kind)
        layer = self._layer(None)
        noise = {name: ops.from_numpy(random.random(tokens, np.float32)) for name in layer.noise}
        context = RouterContext(
            layer=0,
            training=self.traffic.backward,
            token_ids_T=ops.from_numpy(random.integers(self.vocabulary, size=tokens)),
            noise=noise if self.traffic.backward else {},
            topology=self.mesh.topology,
        )
        expert_N = None
        if self.traffic.is_forced:
            topology = self.mesh.topology
            expert_TK = self.traffic.choices(
                self.model.moe, tokens, rank=world.rank, size=world.size, node=topology.node, nodes=topology.nodes
            )
            expert_N = ops.from_numpy(expert_TK.reshape(-1))
        return _Inputs(ops.from_numpy(x_TD), ops.from_numpy(mixing_TD), context, expert_N)

    def _passes(self, layer: MoELayer, params: Mapping[str, Array], inputs: _Inputs) -> Callable[[], dict[str, Array]]:
        """The forward pass, and with `backward` the gradients of a weighted sum of the output's elements plus the
        layer's auxiliary losses.
        """
        ops = self.backend.ops
        trained = {spec.name: params[spec.name] for spec in self.specs if spec.trainable} | {"tokens": inputs.x_TD}
        fixed = {spec.name: params[spec.name] for spec in self.specs if not spec.trainable}
        if inputs.expert_N is not None:
            layer.router = FixedChoices(layer.router, inputs.expert_N)

        def forward(values: Mapping[str, Array]) -> tuple[Array, Array]:
            x_TD = ops.cast(values["tokens"], self.backend.dtype)
            y_TD, metrics = layer.forward(ops, {**fixed, **values}, x_TD, inputs.context)
            y_TD = ops.accurate(y_TD)
            return ops.sum(y_TD * inputs.mixing_TD) + layer.auxiliary_loss(ops, metrics), ops.stop_gradient(y_TD)

        if not self.traffic.backward:
            return lambda: {"output": forward(trained)[1]}
        differentiated = self.backend.value_and_grad(forward, has_aux=True)

        def both() -> dict[str, Array]:
            (_, y_TD), gradients = differentiated(trained)
            return {"output": y_TD, **gradients}

        return both

    def _reference(self, inputs: _Inputs) -> dict[str, np.ndarray]:
        """What this rank should get: the layer with all experts local and no exchange, on this rank's tokens. The
        gradients of its experts are summed over the tokens of all ranks.
        """
        ops, world = self.backend.ops, self.mesh.world
        found = self._passes(self._layer(None), self._parameters(range(self.model.moe.num_experts)), inputs)()
        experts = {spec.name for spec in self.specs if spec.is_expert}
        return {
            name: ops.to_numpy(world.reduce_scatter(value) if name in experts else value)
            for name, value in found.items()
        }


@dataclass(frozen=True)
class _Inputs:
    """Tokens of this rank."""

    x_TD: Array
    mixing_TD: Array
    """Weights of the output's elements in the sum that is differentiated."""
    context: RouterContext
    expert_N: Array | None
    """Choices that replace the router's."""


def _initial(spec: ParameterSpec, experts: range) -> np.ndarray:
    """The initial value; of routed experts, only those of `experts`."""
    box = Box.whole(spec.shape)
    return InitialWeights([spec], 0).read(spec.name, box.rows(experts[0], len(experts)) if spec.is_expert else box)
