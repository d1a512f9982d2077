"""The X-MoE router: cosine scores in a low dimension (Chi et al. 2022, arXiv 2204.09179)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, TopKRouterConfig, assign, unit


class XMoEConfig(TopKRouterConfig):
    """Top-k of a softmax over cosines in a low dimension, with a learned temperature."""

    name: Literal["xmoe"] = "xmoe"
    """`xmoe`"""
    has_gate_rows: ClassVar[bool] = True
    gates_follow_probs: ClassVar[bool] = True
    top_k: PositiveInt = 1
    """Experts per token K; at most num_experts."""
    routing_dim: PositiveInt = 16
    """Dimension in which tokens and experts are compared. Ours: 16, as in the authors' released code."""
    initial_temperature: PositiveFloat = 0.3
    """Temperature tau before training. Ours."""

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """Projection, expert embeddings and temperature."""
        return self.routing_dim * (d_model + num_experts) + 1


class XMoERouter(Router[XMoEConfig]):
    """p = softmax(cos(P x, w_e) / tau); the k best experts, with gates p_e. P, w and tau are trained.

    Scores depend on the length of neither x nor w_e. tau = initial_temperature * exp(log_temperature), which
    keeps it positive; that form is ours. The authors' released code neither normalises P x nor has tau; the paper does
    both.
    """

    paper = "On the Representation Collapse of Sparse Mixture of Experts, arXiv 2204.09179"

    def parameter_specs(self) -> list[ParameterSpec]:
        """Expert embeddings w, projection P, and the logarithm of the temperature relative to its initial value."""
        dim = self.config.routing_dim
        return [
            ParameterSpec("weight", (self.num_experts, dim), std=self.init_std),
            ParameterSpec("projection", (dim, self.d_model), std=self.init_std),
            ParameterSpec("log_temperature", (1,), "zeros"),
        ]

    @property
    def gate_dim(self) -> int:
        """`routing_dim`."""
        return self.config.routing_dim

    def gate_cosines(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """Cosine of the projected token and each expert embedding, (T, E), differentiable."""
        low = unit(ops, self.product(ops, x_TD, params["projection"]))
        return ops.linear(low, unit(ops, ops.cast(params["weight"], ops.dtype(low))))

    def logits(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """Cosine over temperature, (T, E)."""
        cosine_TE = self.gate_cosines(ops, params, x_TD)
        scale = ops.exp(-ops.cast(params["log_temperature"], ops.dtype(cosine_TE)))
        return cosine_TE * scale * ops.constant_like(1.0 / self.config.initial_temperature, cosine_TE)

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k experts with the highest cosines."""
        logits_TE = self.logits(ops, params, x_TD)
        probs_TE = ops.softmax(logits_TE)
        expert_TK = ops.topk_ids(logits_TE, self.config.top_k)
        return assign(ops, expert_TK, ops.take_last(probs_TE, expert_TK), logits_TE, probs_TE, all_routed=True)
