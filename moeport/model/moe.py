"""The mixture-of-experts layer: route, drop, dispatch, experts, combine, shared experts, dense block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moeport.config.model import MoELayerConfig
from moeport.core.array import Array
from moeport.core.dispatch import Exchange, Experts, RunExperts, RunPart, plan_dispatch, soft_combine, soft_dispatch
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.drop import DROP_NOISE, drop_overflow
from moeport.core.losses import chosen_counts, load_balance_loss, z_loss
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec, subtree, with_prefix
from moeport.core.rounding import round_to_tile
from moeport.core.routing import RouterContext, Routing, SoftRouting
from moeport.model.capacity import affinity_statistics, capacity_specs, expert_capacity, updated_capacity
from moeport.model.moe_metrics import (
    FILL_RATE,
    NO_CAPACITY,
    MoEMetrics,
    capacity_metrics,
    choices,
    fill_rate,
    measurements,
)
from moeport.routers import build_router
from moeport.routers.base import Router


def mlp_specs(d_model: int, hidden: int, activation: str, std: float, out_std: float) -> list[ParameterSpec]:
    """Weights of one dense feed-forward block: w_in (2F or F, D) and w_out (D, F)."""
    stacked = 2 if activation == "swiglu" else 1
    return [
        ParameterSpec("w_in", (stacked * hidden, d_model), std=std, matrices=stacked, in_compute_type=True),
        ParameterSpec("w_out", (d_model, hidden), std=out_std, matrices=1, in_compute_type=True),
    ]


class MoELayer:
    """One layer's shapes, router and forward pass; holds no arrays.

    Args:
        config: the `model.moe` section.
        d_model: width D.
        init_std: standard deviation of initial weights.
        out_std: the same, for the weights that write to the residual stream.
        vocab_size: V, for routers that look at token ids.
    """

    def __init__(
        self, config: MoELayerConfig, d_model: int, init_std: float, out_std: float, vocab_size: int | None = None
    ):
        self.config = config
        self.d_model = d_model
        self.init_std = init_std
        self.out_std = out_std
        self.router: Router[Any] = build_router(config.router, d_model, config.num_experts, init_std, vocab_size)
        self.router.in_compute_type = config.router_dtype == "compute"
        coefficient = config.load_balance.coefficient
        self.load_balance_coefficient = self.router.load_balance if coefficient is None else coefficient
        self.exchange: Exchange | None = None
        """How tokens reach the experts of other ranks; None: all experts are local."""
        self.mean_over_ranks: Callable[[Array], Array] | None = None
        """Mean of an array over the ranks that train together; None: this process trains alone."""
        self.adds_dense = config.residual_hidden > 0
        """Whether the dense block is beside the experts; False too where the caller applies it after them."""

    @property
    def noise(self) -> tuple[str, ...]:
        """Names of the random numbers that router and drops need in training, one number per token each."""
        return self.router.noise + self._drop_noise

    @property
    def _drop_noise(self) -> tuple[str, ...]:
        capacity = self.config.capacity
        if not capacity.has_limit or capacity.drop != "random":
            return ()
        return tuple(DROP_NOISE.format(choice) for choice in range(self.config.router.experts_per_token))

    def parameter_specs(self) -> list[ParameterSpec]:
        """Router, experts (w_in (E, 2F, D), w_out (E, D, F)), shared experts (as one block of their joint width)
        and their mixing weights (2, D) or (1, D), dense block.
        """
        config = self.config
        expert = mlp_specs(self.d_model, config.expert_hidden, config.activation, self.init_std, self.out_std)
        specs = with_prefix("router", self.router.parameter_specs()) + [
            replace(spec, name=f"experts.{spec.name}", shape=(config.num_experts, *spec.shape)) for spec in expert
        ]
        if config.num_shared_experts:
            width = config.shared_width
            specs += with_prefix(
                "shared", mlp_specs(self.d_model, width, config.activation, self.init_std, self.out_std)
            )
            if config.mixes_shared_experts:
                specs.append(ParameterSpec("mixing.weight", (config.mixing_rows, self.d_model), std=self.init_std))
        if config.residual_hidden:
            dense = mlp_specs(self.d_model, config.residual_hidden, config.activation, self.init_std, self.out_std)
            specs += with_prefix("dense", dense)
        return specs + capacity_specs(config.capacity)

    def forward(
        self,
        ops: Ops,
        params: Mapping[str, Array],
        x_TD: Array,
        context: RouterContext,
        run_experts: RunExperts | None = None,
        run_part: RunPart | None = None,
    ) -> tuple[Array, MoEMetrics]:
        """Apply the layer. Without tokens it has no rows, and every gradient is 0.

        Args:
            ops: the backend's operations.
            params: arrays by the names of `parameter_specs`.
            x_TD: (T, D), sequence after sequence.
            context: for the router; the sequence-wise load-balancing loss also uses its number of sequences.
            run_experts: supplies the weights of the local experts; by default they are taken from `params`.
            run_part: supplies the parameters of every other part; by default they are taken from `params`.

        Returns: (y_TD, metrics).
        """
        config = self.config

        def run_local(compute: Callable[..., Array], *arrays: Array) -> Array:
            return compute(params["experts.w_in"], params["experts.w_out"], *arrays)

        def from_params(part: str, compute: Callable[..., Any], *arrays: Array) -> Any:
            return compute(subtree(part, params), *arrays)

        run_experts = run_local if run_experts is None else run_experts
        run_part = from_params if run_part is None else run_part
        if x_TD.shape[0] == 0 and self.exchange is None:
            return self._empty(ops, x_TD, context, run_experts, run_part)
        chosen = run_part("router", partial(self._choose, ops, context), x_TD)
        if isinstance(chosen, SoftRouting):
            y_TD, metrics = self._soft(ops, x_TD, chosen, context, run_experts)
        else:
            y_TD, metrics = self._sparse(ops, params, x_TD, chosen, context, run_experts)
        if config.routed_scaling_factor != 1.0:
            y_TD = y_TD * ops.constant_like(config.routed_scaling_factor, y_TD)
        if config.num_shared_experts:
            shared_TD = run_part("shared", partial(self.mlp, ops), x_TD)
            if config.mixes_shared_experts:
                logits = run_part("mixing", lambda own, x_TD: ops.linear(ops.accurate(x_TD), own["weight"]), x_TD)
                y_TD = _mixed(ops, logits, y_TD, shared_TD)
            else:
                y_TD = y_TD + shared_TD
        if self.adds_dense:
            y_TD = y_TD + run_part("dense", partial(self.mlp, ops), x_TD)
        return y_TD, metrics

    def _choose(
        self, ops: Ops, context: RouterContext, params: Mapping[str, Array], x_TD: Array
    ) -> Routing | SoftRouting:
        """The router's choice, with the cosines that an estimated capacity needs."""
        with ops.part("router"):
            chosen = self.router.route(ops, params, x_TD, context)
            if isinstance(chosen, SoftRouting) or not self.config.capacity.is_estimated:
                return chosen
            return replace(chosen, cosine_TE=self.router.gate_cosines(ops.unrecorded(), params, x_TD))

    def mlp(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """Apply the shared experts or the dense block, whichever `params` are of; also to (B, S, D)."""
        return ops.mlp(x_TD, params["w_in"], params["w_out"], self.config.activation)

    def _empty(
        self, ops: Ops, x_TD: Array, context: RouterContext, run_experts: RunExperts, run_part: RunPart
    ) -> tuple[Array, MoEMetrics]:
        """No rows, no losses, and gradients of 0, since data parallelism waits for the gradient of every parameter."""

        def nothing(params: Mapping[str, Array], x_TD: Array) -> Array:
            return _plus_zeros(ops, x_TD, *params.values())

        def nothing_of_experts(w_in: Array, w_out: Array, x_TD: Array) -> Array:
            return _plus_zeros(ops, x_TD, w_in, w_out)

        config = self.config
        y_TD = run_experts(nothing_of_experts, run_part("router", nothing, x_TD))
        parts = {
            "shared": config.num_shared_experts,
            "mixing": config.num_shared_experts and config.mixes_shared_experts,
            "dense": self.adds_dense,
        }
        for part in (name for name, present in parts.items() if present):
            y_TD = run_part(part, nothing, y_TD)
        loss = ops.sum(ops.accurate(y_TD))
        none_E = ops.from_numpy(np.zeros(config.num_experts, np.int64))
        return y_TD, MoEMetrics(
            load_balance=None,
            router_z=None,
            own_loss=loss,
            chosen_E=none_E,
            served_E=none_E,
            **NO_CAPACITY,
            measured={FILL_RATE: ops.stop_gradient(loss)} if self._rounds(context) else {},
        )

    def _sparse(
        self,
        ops: Ops,
        params: Mapping[str, Array],
        x_TD: Array,
        chosen: Routing,
        context: RouterContext,
        run_experts: RunExperts,
    ) -> tuple[Array, MoEMetrics]:
        """Apply the routed experts to the tokens assigned to them."""
        config = self.config
        with ops.part("router"):
            capacity = expert_capacity(ops, config.capacity, params, chosen)
            kept = routing = chosen
            if capacity is not None:
                noise = [context.noise[name] for name in self._drop_noise] if context.training else []
                kept = routing = drop_overflow(ops, chosen, capacity, config.capacity.drop, noise)
            elif self._rounds(context):
                kept, routing = round_to_tile(ops, chosen, config.capacity.tile)

        with ops.part("dispatch"):
            if self.exchange is None:
                plan = plan_dispatch(ops, routing)
                y_TD, counts_E = self._routed(ops, x_TD, routing.weight_N, plan, run_experts), plan.counts_E
            else:
                y_TD = self.exchange(ops, x_TD, routing, self._experts(ops, run_experts))
                counts_E = chosen_counts(ops, routing.expert_N, config.num_experts)

        if context.continues:
            return y_TD, MoEMetrics(None, None, None, chosen_E=counts_E, served_E=counts_E, **NO_CAPACITY, measured={})
        with ops.part("measures"):
            if kept is not routing:
                counts_E = chosen_counts(ops, kept.expert_N, config.num_experts)
            metrics = self._metrics(ops, chosen, kept, capacity, counts_E, context)
            if kept is not routing:
                metrics.measured[FILL_RATE] = fill_rate(ops.unrecorded(), kept, routing)
            return y_TD, metrics

    def _rounds(self, context: RouterContext) -> bool:
        """Whether rows are rounded to tiles: in training only, where a token may depend on others of its batch."""
        return self.config.capacity.policy == "round" and context.training

    def _metrics(
        self,
        ops: Ops,
        chosen: Routing,
        routing: Routing,
        capacity: int | Array | None,
        counts_E: Array,
        context: RouterContext,
    ) -> MoEMetrics:
        """Losses and measurements of the routed experts: `chosen` by the router, served as `routing` says."""
        chosen_E = counts_E if routing is chosen else chosen_counts(ops, chosen.expert_N, self.config.num_experts)
        return MoEMetrics(
            load_balance=self._load_balance(ops, chosen, context, chosen_E),
            router_z=self._router_z(ops, chosen.logits_TE),
            own_loss=chosen.own_loss,
            chosen_E=chosen_E,
            served_E=counts_E,
            **self._capacity_metrics(ops.unrecorded(), chosen, routing, capacity, context),
            measured=self._measured(ops.unrecorded(), chosen, chosen_E, context),
        )

    def _measured(
        self, ops: Ops, chosen: Routing | SoftRouting, chosen_E: Array, context: RouterContext
    ) -> dict[str, Array]:
        found = measurements(ops, chosen, chosen_E, self.config.router.nodes, context.topology)
        return found | choices(chosen) if context.keeps_choices and isinstance(chosen, Routing) else found

    def _routed(self, ops: Ops, x_TD: Array, weight_N: Array, plan: DispatchPlan, run_experts: RunExperts) -> Array:
        """All experts are local, so a backend may fuse dispatch and combine with them."""

        def compute(w_in: Array, w_out: Array, x_TD: Array, weight_N: Array) -> Array:
            return ops.routed_mlp(x_TD, weight_N, plan, w_in, w_out, self.config.activation)

        return run_experts(compute, x_TD, weight_N)

    def _experts(self, ops: Ops, run_experts: RunExperts) -> Experts:
        """The local experts as a function of rows."""

        def compute(w_in: Array, w_out: Array, x_RD: Array, counts_E: Array) -> Array:
            return ops.grouped_mlp(x_RD, w_in, w_out, counts_E, self.config.activation)

        return partial(run_experts, compute)

    def _capacity_metrics(
        self,
        ops: Ops,
        chosen: Routing,
        served: Routing,
        capacity: int | Array | None,
        context: RouterContext,
    ) -> dict[str, Array | None]:
        found = capacity_metrics(ops, chosen, served, capacity, context.num_sequences)
        if chosen.cosine_TE is not None:
            found["affinity_4E"] = affinity_statistics(ops, self.config.capacity, chosen.cosine_TE, chosen)
        return found

    def _load_balance(self, ops: Ops, chosen: Routing, context: RouterContext, chosen_E: Array) -> Array | None:
        if not self.load_balance_coefficient:
            return None
        scope = self.config.load_balance.scope
        sequences = context.num_sequences if scope == "sequence" else 1
        over_ranks = self.mean_over_ranks if scope == "global" else None
        return load_balance_loss(ops, chosen, sequences, over_ranks, chosen_E)

    def _router_z(self, ops: Ops, logits_TE: Array) -> Array | None:
        return z_loss(ops, ops.logsumexp(logits_TE)) if self.config.router_z_loss else None

    def _soft(
        self, ops: Ops, x_TD: Array, chosen: SoftRouting, context: RouterContext, run_experts: RunExperts
    ) -> tuple[Array, MoEMetrics]:
        """Apply the routed experts to weighted means of tokens."""
        with ops.part("dispatch"):
            x_RD, counts_E = soft_dispatch(ops, x_TD, chosen)
            exchange, experts = self.exchange, self._experts(ops, run_experts)
            y_RD = experts(x_RD, counts_E) if exchange is None else exchange.of_rows(ops, x_RD, counts_E, experts)
            y_TD = soft_combine(ops, y_RD, chosen)
        return y_TD, MoEMetrics(
            load_balance=None,
            router_z=self._router_z(ops, chosen.logits_TE),
            own_loss=None,
            chosen_E=counts_E,
            served_E=counts_E,
            **NO_CAPACITY,
            measured=self._measured(ops.unrecorded(), chosen, counts_E, context),
        )

    def updated_state(
        self, state: Mapping[str, np.ndarray], chosen_E: np.ndarray, affinity_4E: np.ndarray
    ) -> dict[str, np.ndarray]:
        """New values of the untrained parameters of router and capacity after an optimiser step.

        Args:
            state: their current values by the names of `parameter_specs`.
            chosen_E: assignments of the whole step, over all ranks and micro-batches.
            affinity_4E: the sum of the metric of that name over the same.
        """
        updates = {
            f"router.{name}": value
            for name, value in self.router.update_state(subtree("router", state), chosen_E).items()
        }
        if self.config.capacity.is_estimated:
            dim, experts = self.router.gate_dim, self.config.num_experts
            updates |= updated_capacity(self.config.capacity, state, affinity_4E, dim, experts)
        return updates

    def auxiliary_loss(self, ops: Ops, metrics: MoEMetrics, dtype: str = "float32") -> Array:
        """The weighted sum that enters the training loss; a 0 of type `dtype` if all losses are off."""
        coefficients = (self.load_balance_coefficient, self.config.router_z_loss)
        pairs = zip((metrics.load_balance, metrics.router_z), coefficients, strict=True)
        losses = [loss * ops.constant_like(weight, loss) for loss, weight in pairs if loss is not None]
        if metrics.own_loss is not None:
            losses.append(metrics.own_loss)
        return sum(losses[1:], losses[0]) if losses else ops.zeros((), dtype)


def _plus_zeros(ops: Ops, x_TD: Array, *params: Array) -> Array:
    """x of no rows, computed from no entry of each parameter, which gives each a gradient of 0."""
    for parameter in params:
        x_TD = x_TD + ops.cast(ops.sum(parameter[:0]), ops.dtype(x_TD))
    return x_TD


def _mixed(ops: Ops, logits: Array, routed_TD: Array, shared_TD: Array) -> Array:
    """Routed and shared experts, weighted by a two-way softmax (CartesianMoE, arXiv 2410.16077) of logits (T, 2), or
    the shared ones alone by the sigmoid of logits (T, 1) (Qwen2, arXiv 2407.10671, section 2.2.2).
    """
    if logits.shape[1] == 1:
        return routed_TD + shared_TD * ops.cast(ops.sigmoid(logits), ops.dtype(shared_TD))
    share_T2 = ops.cast(ops.softmax(logits), ops.dtype(routed_TD))
    return routed_TD * share_T2[:, :1] + shared_TD * share_T2[:, 1:]
