"""The fixed gate and the locality loss that LocMoE and LocMoE+ share (arXiv 2401.13920, 2406.00023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import Topology, of_node
from moeport.routers.base import Router, RouterConfig, unit

_TINY = 1e-30
"""Added to a share of tokens, so that a share of 0 has a logarithm."""


class GrAPConfig(RouterConfig):
    """Options of the fixed gate and of the locality loss."""

    splits_width: ClassVar[bool] = True
    has_affinity: ClassVar[bool] = True
    has_gate_rows: ClassVar[bool] = True
    temperature: PositiveFloat = 1.0
    """Divides the logits before the softmax. Ours: the paper has no temperature, which is 1."""
    locality_coefficient: NonNegativeFloat = 0.01
    """mu: weight of each layer's locality loss in the training loss; 0 turns it off. Ours: the paper gives no value."""
    locality_smoothing: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """eta: share of a node's tokens that the target distribution leaves to other nodes' experts. Ours: with 0, as
    printed, the loss is infinite."""

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """0: the gate is fixed."""
        return 0


GrAPConfigT = TypeVar("GrAPConfigT", bound=GrAPConfig)


class GrAPRouter(Router[GrAPConfigT]):
    """Grouped average pooling: gate row e is E / D on the e-th of E groups of features and 0 elsewhere.

    The rows are orthogonal, have length sqrt(E / D) and are not trained. E must divide D.
    """

    def parameter_specs(self) -> list[ParameterSpec]:
        """None."""
        return []

    def group_means(self, ops: Ops, x_TD: Array) -> Array:
        """Gate times x, (T, E): the mean of each group of features (LocMoE, section 3.2)."""
        return ops.mean(ops.reshape(x_TD, (x_TD.shape[0], self.num_experts, -1)), axis=-1)

    def gate_cosines(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """Cosine of each token and each gate row, (T, E), differentiable."""
        means_TE = self.group_means(ops, unit(ops, ops.accurate(x_TD)))
        return means_TE * ops.constant_like(math.sqrt(self.d_model / self.num_experts), means_TE)

    def locality_loss(self, ops: Ops, probs_TE: Array, topology: Topology) -> Array | None:
        """mu times the mean over nodes of KL(D_c || D_l), a scalar; None if mu is 0.

        D_c is the mean probability of each expert over a node's tokens; this is ours: the paper's distribution of
        assignments has no gradient. D_l gives each of the node's own l experts (1 - eta) / l and each other expert
        eta / (E - l); for a node with all experts, or none, it is uniform.
        """
        config = self.config
        if not config.locality_coefficient:
            return None
        if config.nodes is None:
            divergence = self._divergence(ops, probs_TE, topology.nodes, topology.node)
        else:
            nodes, tokens = config.nodes, probs_TE.shape[0]
            spans = [of_node(node, nodes, tokens) for node in range(nodes)]
            found = [
                self._divergence(ops, probs_TE[start:end], nodes, node)
                for node, (start, end) in enumerate(spans)
                if start < end
            ]
            divergence = sum(found[1:], found[0]) * ops.constant_like(1.0 / len(found), probs_TE)
        return divergence * ops.constant_like(config.locality_coefficient, divergence)

    def _divergence(self, ops: Ops, probs_TE: Array, nodes: int, node: int) -> Array:
        """KL(D_c || D_l) of the tokens of one node."""
        experts, eta = self.num_experts, self.config.locality_smoothing
        first, end = of_node(node, nodes, experts)
        share_E = ops.mean(probs_TE, axis=0)
        entropy = -ops.sum(share_E * ops.log(share_E + ops.constant_like(_TINY, share_E)))
        local = end - first
        if local in (0, experts):
            return ops.constant_like(math.log(experts), share_E) - entropy
        inside = ops.sum(share_E[first:end])
        outside = ops.constant_like(1.0, share_E) - inside
        log_inside = ops.constant_like(math.log((1.0 - eta) / local), share_E)
        log_outside = ops.constant_like(math.log(eta / (experts - local)), share_E)
        return -entropy - inside * log_inside - outside * log_outside
