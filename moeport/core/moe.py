"""The mixture-of-experts layer: route, drop, dispatch, experts, combine, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeport.config.model import MoEConfig
from moeport.core.capacity import drop_overflow, expert_capacity
from moeport.core.dispatch import combine, dispatch
from moeport.core.losses import chosen_counts, load_balance_loss, z_loss
from moeport.core.ops import Array, Ops
from moeport.core.parameters import ParameterSpec, under, with_prefix
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.base import Router


@dataclass(frozen=True)
class MoEMetrics:
    """What a layer reports beside its output."""

    load_balance: Array
    """Load-balancing loss, not yet weighted; a scalar. 0 if its coefficient is 0."""
    router_z: Array
    """Router z-loss, not yet weighted; a scalar. 0 if its coefficient is 0."""
    own_loss: Array
    """Loss that only this router has, weighted; a scalar. 0 for most routers."""
    chosen_E: Array
    """Assignments the router chose each expert for, before any drop."""
    served_E: Array
    """Assignments each expert computed."""


def mlp_specs(d_model: int, hidden: int, activation: str, std: float, out_std: float) -> list[ParameterSpec]:
    """Weights of one dense feed-forward block: w_in (2F or F, D) and w_out (D, F)."""
    rows = 2 * hidden if activation == "swiglu" else hidden
    return [
        ParameterSpec("w_in", (rows, d_model), std=std),
        ParameterSpec("w_out", (d_model, hidden), std=out_std),
    ]


class MoELayer:
    """One layer's shapes, router and forward pass; holds no arrays.

    Args:
        config: the `model.moe` section.
        d_model: width D.
        init_std: standard deviation of initial weights.
        out_std: the same for the weights that write to the residual stream.
    """

    def __init__(self, config: MoEConfig, d_model: int, init_std: float, out_std: float):
        self.config = config
        self.d_model = d_model
        self.init_std = init_std
        self.out_std = out_std
        self.router: Router[Any] = build_router(config.router, d_model, config.num_experts, init_std)
        coefficient = config.load_balance.coefficient
        self.load_balance_coefficient = self.router.load_balance if coefficient is None else coefficient

    def parameter_specs(self) -> list[ParameterSpec]:
        """Router, experts (w_in (E, 2F, D), w_out (E, D, F)) and shared experts (as one block of their joint width)."""
        config = self.config
        expert = mlp_specs(self.d_model, config.expert_hidden, config.activation, self.init_std, self.out_std)
        specs = with_prefix("router", self.router.parameter_specs()) + [
            ParameterSpec(f"experts.{spec.name}", (config.num_experts, *spec.shape), std=spec.std) for spec in expert
        ]
        if config.num_shared_experts:
            width = config.num_shared_experts * config.expert_hidden
            specs += with_prefix(
                "shared", mlp_specs(self.d_model, width, config.activation, self.init_std, self.out_std)
            )
        return specs

    def forward(
        self,
        ops: Ops,
        params: Mapping[str, Array],
        x_TD: Array,
        context: RouterContext,
        num_sequences: int = 1,
    ) -> tuple[Array, MoEMetrics]:
        """Apply the layer.

        Args:
            ops: the backend's operations.
            params: arrays by the names of `parameter_specs`.
            x_TD: (T, D), sequence after sequence.
            context: for the router.
            num_sequences: sequences that make up T; the sequence-wise load-balancing loss needs it.

        Returns: (y_TD, metrics).
        """
        config = self.config
        chosen = self.router.route(ops, under("router", params), x_TD, context)
        capacity = expert_capacity(config.capacity, chosen)
        routing = chosen if capacity is None else drop_overflow(ops, chosen, capacity, config.capacity.drop)

        x_RD, counts_E, plan = dispatch(ops, x_TD, routing)
        y_RD = ops.grouped_mlp(x_RD, params["experts.w_in"], params["experts.w_out"], counts_E, config.activation)
        y_TD = combine(ops, y_RD, routing, plan)
        if config.routed_scaling_factor != 1.0:
            y_TD = y_TD * ops.constant_like(config.routed_scaling_factor, y_TD)
        if config.num_shared_experts:
            y_TD = y_TD + ops.mlp(x_TD, params["shared.w_in"], params["shared.w_out"], config.activation)

        zero = ops.zeros((), ops.dtype(chosen.logits_TE))
        scope = num_sequences if config.load_balance.scope == "sequence" else 1
        return y_TD, MoEMetrics(
            load_balance=load_balance_loss(ops, chosen, scope) if self.load_balance_coefficient else zero,
            router_z=z_loss(ops, ops.logsumexp(chosen.logits_TE)) if config.router_z_loss else zero,
            own_loss=zero if chosen.own_loss is None else chosen.own_loss,
            chosen_E=counts_E if capacity is None else chosen_counts(ops, chosen.expert_N, config.num_experts),
            served_E=counts_E,
        )

    def auxiliary_loss(self, ops: Ops, metrics: MoEMetrics) -> Array:
        """The weighted sum that enters the training loss."""
        balance = metrics.load_balance * ops.constant_like(self.load_balance_coefficient, metrics.load_balance)
        z = metrics.router_z * ops.constant_like(self.config.router_z_loss, metrics.router_z)
        return balance + z + metrics.own_loss
