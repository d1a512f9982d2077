"""A whole MoE layer whose experts are divided among the ranks, and the same layer with all experts in one process.

Shape suffixes as in `moeport.core.ops`; e: experts of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeport.backends.base import Backend
from moeport.comm.communicator import ITEM_BYTES, Communicator
from moeport.comm.exchange import EXCHANGES, ExpertExchange
from moeport.comm.mesh import Mesh
from moeport.config.model import MoEConfig
from moeport.config.schema import Config
from moeport.core.array import Array
from moeport.core.dispatch import Experts, combine, dispatch
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec, generator, initial_value
from moeport.core.routing import RouterContext, Routing, SoftRouting
from moeport.errors import UserError
from moeport.model.auto_exchange import FastestExchange, fastest
from moeport.model.moe import MoELayer
from moeport.plan.traffic import expert_choices
from moeport.routers.base import Router

LOCAL = "local"
"""The layer without an all-to-all."""
AUTO = "auto"
"""What `comm.algorithm: auto` chooses for the size."""
ALGORITHMS = (LOCAL, *EXCHANGES)
"""What is measured unless something else is asked for."""
VOCABULARY = 32768
"""Token ids, for routers that look at them, where the config does not say."""
TOLERANCES = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.05}
"""By compute type, how far a value may be from that of one process: so much of its size and of the root mean square of
its array. Both compute the same products, and sum them in other blocks and another order, so they differ by a few
roundings of the type. The largest differences seen were 1.5e-15, 1.2e-6 and 1.2e-2, of the gradients of experts, and
they grow with the square root of the number of terms. A row that is lost, counted twice or given to another expert
moves a value by about the root mean square itself.

An array whose root mean square is within the tolerance of the largest array's is rounding, such as the gradient of a
router whose only gate is normalised to 1. Its values need only be as small: ten times that."""


@dataclass(frozen=True)
class LayerTraffic:
    """Where the tokens go."""

    kind: str
    """`router`: where the layer's router sends them. Else as in `expert_choices`; gates remain those of the router."""
    backward: bool
    """Forward and backward pass in one."""

    @property
    def is_forced(self) -> bool:
        """Whether the choices are not the router's."""
        return self.kind != "router"

    def check(self, config: MoEConfig) -> None:
        """Raises UserError for choices that the layer's router cannot be given."""
        if not self.is_forced:
            return
        if config.router.fixed_load:
            raise UserError(f"--traffic {self.kind}: with router {config.router.name} experts choose; expected router")
        try:
            self.choices(config, 1, rank=0, size=1, node=0, nodes=1)
        except UserError as error:
            raise UserError(f"{error}; or router, for the choices of the layer's own") from error

    def choices(self, config: MoEConfig, tokens: int, *, rank: int, size: int, node: int, nodes: int) -> np.ndarray:
        """Experts of each token, (T, K); see `expert_choices`."""
        top_k = config.router.experts_per_token
        return expert_choices(
            self.kind, tokens, config.num_experts, top_k, rank=rank, size=size, node=node, nodes=nodes
        )


@dataclass(frozen=True)
class LayerRun:
    """A layer with one algorithm and tokens of one size, ready to run."""

    algorithm: str
    chunks: int
    tokens: int
    """Of one rank."""
    bytes: int
    """Of them."""
    type: str
    run: Callable[[], dict[str, Array]]
    """Returns the output, and with the backward pass the gradients of the tokens and of the parameters of this rank."""
    reference: Mapping[str, np.ndarray] | None
    """The same of one process with all experts; None: not known."""
    ops: Ops

    def wrong(self, got: Mapping[str, Array]) -> int:
        """Elements that are too far from the reference."""
        wanted, tolerance, wrong = self.reference or {}, TOLERANCES[self.type], 0
        size = {name: float(np.sqrt(np.square(want).mean())) for name, want in wanted.items()}
        rounding = tolerance * max(size.values(), default=0.0)
        for name, want in wanted.items():
            limit = 10 * rounding if size[name] <= rounding else tolerance * (size[name] + np.abs(want))
            wrong += int((~(np.abs(self.ops.to_numpy(got[name]) - want) <= limit)).sum())
        return wrong


class LayerBench:
    """One layer on all ranks, for tokens of any size. Every rank makes it and calls its methods.

    Args:
        config: the layer's shapes.
        backend: for operations and gradients.
        communicator: all ranks, which divide the experts among themselves.
        algorithms: of ALGORITHMS, or AUTO.
        chunks: numbers of parts for each algorithm; AUTO tries its own if they are several.
        traffic: where tokens go.
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
        self.exchanges: list[tuple[str, ExpertExchange | OwnExperts]] = []
        for name in algorithms:
            if name == LOCAL:
                self.exchanges.append((name, OwnExperts(local)))
            elif name != AUTO:
                self.exchanges += [(name, self._exchange(name, count)) for count in chunks]
        trial = {"algorithm": "auto", "chunks": chunks[0] if len(chunks) == 1 else "auto"}
        self.trial = config.model_copy(update={"comm": config.comm.model_copy(update=trial)})
        self.tries = AUTO in algorithms
        self.choice: tuple[FastestExchange, ExpertExchange] | None = None
        """Of the size that was prepared last."""
        self.params = self._parameters(range(communicator.rank * local, (communicator.rank + 1) * local))

    @property
    def communicators(self) -> list[Communicator]:
        """All that carry data, that of all ranks first."""
        carrying = [each for _, exchange in self._all() for each in exchange.communicators]
        return list(dict.fromkeys([self.mesh.world, *carrying]))

    def prepare(self, size: int, check: bool) -> list[LayerRun]:
        """Every algorithm with tokens of `size` bytes on each rank, rounded down to whole tokens, one at least.

        Args:
            size: bytes.
            check: compute the reference too, for which each rank holds all experts.
        """
        width, dtype = self.model.d_model, self.backend.dtype
        row_bytes = width * ITEM_BYTES[dtype]
        tokens = max(1, size // row_bytes)
        inputs = self._inputs(tokens)
        reference = self._reference(inputs) if check else None
        if self.tries:
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

    def _all(self) -> list[tuple[str, ExpertExchange | OwnExperts]]:
        return self.exchanges + ([(AUTO, self.choice[1])] if self.choice else [])

    def _exchange(self, name: str, chunks: int) -> ExpertExchange:
        return EXCHANGES[name](self.mesh.world, self.model.moe.num_experts, chunks)

    def _choose(self, tokens: int) -> tuple[FastestExchange, ExpertExchange]:
        backend, moe = self.backend, self.model.moe
        top_k = moe.router.experts_per_token
        choice = fastest(self.mesh, self.trial, tokens, top_k, backend.dtype, backend.value_and_grad)
        return choice, self._exchange(choice.algorithm, choice.chunks)

    def _layer(self, exchange: ExpertExchange | OwnExperts | None) -> MoELayer:
        model = self.model
        layer = MoELayer(model.moe, model.d_model, model.init_std, model.init_std, self.vocabulary)
        layer.exchange = exchange
        if self.mesh.world.size > 1:
            layer.mean_over_ranks = self.mesh.mean
        return layer

    def _parameters(self, experts: range) -> dict[str, Array]:
        """Initial values, of the routed experts those of `experts` alone."""
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
        """The forward pass, or that and the gradients of the sum of the output's elements, each by a factor of its
        own, and of the layer's auxiliary losses.
        """
        ops = self.backend.ops
        trained = {spec.name: params[spec.name] for spec in self.specs if spec.trainable} | {"tokens": inputs.x_TD}
        fixed = {spec.name: params[spec.name] for spec in self.specs if not spec.trainable}
        if inputs.expert_N is not None:
            layer.router = _Given(layer.router, inputs.expert_N)

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
        """What this rank should get: the layer with all experts here and no exchange, on its own tokens. The gradients
        of its experts are summed over the tokens of all ranks.
        """
        ops, world = self.backend.ops, self.mesh.world
        found = self._passes(self._layer(None), self._parameters(range(self.model.moe.num_experts)), inputs)()
        experts = {spec.name for spec in self.specs if spec.is_expert}
        return {
            name: ops.to_numpy(world.reduce_scatter(value) if name in experts else value)
            for name, value in found.items()
        }


class OwnExperts:
    """Stands where an exchange does: as many rows, all to the experts of this rank.

    Args:
        num_experts: of this rank.
    """

    communicators: tuple[Communicator, ...] = ()
    chunks = 1

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """See ExpertExchange; expert j of all stands for expert j mod e."""
        expert_N = ops.to_numpy(routing.expert_N)
        own_N = np.where(expert_N < routing.num_experts, expert_N % self.num_experts, self.num_experts)
        own = replace(routing, expert_N=ops.from_numpy(own_N), num_experts=self.num_experts)
        x_RD, counts_e, plan = dispatch(ops, x_TD, own)
        return combine(ops, experts(x_RD, counts_e), own, plan)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """See ExpertExchange; each expert takes the rows of as many that follow each other."""
        return experts(x_RD, ops.from_numpy(ops.to_numpy(counts_E).reshape(self.num_experts, -1).sum(1)))


@dataclass(frozen=True)
class _Inputs:
    """Tokens of this rank."""

    x_TD: Array
    mixing_TD: Array
    """What multiplies the output in the sum that is differentiated."""
    context: RouterContext
    expert_N: Array | None
    """Choices in place of the router's."""


class _Given(Router[Any]):
    """A router that scores and weighs, and whose choices are given."""

    def __init__(self, router: Router[Any], expert_N: Array):
        super().__init__(router.config, router.d_model, router.num_experts, router.init_std, router.vocab_size)
        self.router, self.expert_N, self.noise = router, expert_N, router.noise

    def parameter_specs(self) -> list[ParameterSpec]:
        """See Router."""
        return self.router.parameter_specs()

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """See Router."""
        chosen = self.router.route(ops, params, x_TD, context)
        assert not isinstance(chosen, SoftRouting)
        return replace(chosen, expert_N=self.expert_N)

    def gate_cosines(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """See Router."""
        return self.router.gate_cosines(ops, params, x_TD)


def _initial(spec: ParameterSpec, experts: range) -> np.ndarray:
    """The initial value, of routed experts those of `experts`, each of which draws from a generator of its own."""
    if not spec.is_expert:
        return initial_value(spec, 0)
    return np.stack([initial_value(replace(spec, name=f"{spec.name}.{e}", shape=spec.shape[1:]), 0) for e in experts])
