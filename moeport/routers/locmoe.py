"""The LocMoE router: a fixed orthogonal gate and a locality loss (Li et al. 2024, arXiv 2401.13920)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import assign
from moeport.routers.grap import GrAPConfig, GrAPRouter


class LocMoEConfig(GrAPConfig):
    """Top-1 of a softmax over the means of feature groups, with a loss that draws tokens to their own node."""

    name: Literal["locmoe"] = "locmoe"
    """`locmoe`"""
    scores: Literal["cosine", "mean"] = "cosine"
    """`mean`: the group means, as printed; their softmax is almost uniform, so every gate is about 1 / E.
    `cosine`: sqrt(D) times the cosine of token and gate row, which has variance 1 for tokens without a preferred
    direction.
    The default is ours."""
    relu: Literal["none", "after_choice", "before_choice"] = "none"
    """`before_choice`: apply ReLU to the scores, then choose the best expert, as printed; a token without a positive
    score goes to expert 0. `after_choice`: choose the best expert, then apply ReLU and softmax. `none`: no ReLU, which
    would block the gradient of every negative score. The default is ours."""
    epsilon: Literal["none", "bias", "noise"] = "none"
    """The term that the paper adds to each score and does not explain. `bias`: a trained number per expert. `noise`: in
    training, uniform noise with mean 0 and standard deviation 1 / E. The default is ours."""

    @property
    def experts_per_token(self) -> int:
        """1."""
        return 1

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """The bias, if there is one."""
        return num_experts if self.epsilon == "bias" else 0


class LocMoERouter(GrAPRouter[LocMoEConfig]):
    """y = p_i E_i(x) with i = argmax p, p = softmax(ReLU(w_e x + epsilon_e)), w_e = E / D on the e-th of E groups.

    The groups are groups of features, and the gate w is fixed. This is the printed form, `scores: mean` with
    `relu: before_choice`; the defaults avoid its pitfalls. The router's own loss is the locality loss.
    """

    paper = "LocMoE, arXiv 2401.13920, sections 3.2 and 3.3"

    def __init__(
        self,
        config: LocMoEConfig,
        d_model: int,
        num_experts: int,
        init_std: float = 0.02,
        vocab_size: int | None = None,
    ):
        super().__init__(config, d_model, num_experts, init_std, vocab_size)
        if config.epsilon == "noise":
            self.noise = tuple(f"epsilon_{expert}" for expert in range(num_experts))

    def parameter_specs(self) -> list[ParameterSpec]:
        """The bias, if there is one."""
        return [ParameterSpec("bias", (self.num_experts,), "zeros")] if self.config.epsilon == "bias" else []

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The expert with the highest score; ties go to the lower index."""
        config = self.config
        cosine_TE = self.gate_cosines(ops, params, x_TD)
        if config.scores == "cosine":
            score_TE = cosine_TE * ops.constant_like(math.sqrt(self.d_model), cosine_TE)
        else:
            score_TE = self.group_means(ops, ops.accurate(x_TD))
        score_TE = self._with_epsilon(ops, params, score_TE, context)
        zero = ops.constant_like(0.0, score_TE)
        rectified_TE = ops.where(score_TE > zero, score_TE, zero)
        expert_T1 = ops.topk_ids(rectified_TE if config.relu == "before_choice" else score_TE, 1)
        logits_TE = score_TE if config.relu == "none" else rectified_TE
        logits_TE = logits_TE * ops.constant_like(1.0 / config.temperature, logits_TE)
        probs_TE = ops.softmax(logits_TE)
        return assign(
            ops,
            expert_T1,
            ops.take_last(probs_TE, expert_T1),
            logits_TE,
            probs_TE,
            own_loss=self.locality_loss(ops, probs_TE, context.topology),
            affinity_TK=ops.take_last(cosine_TE, expert_T1),
            all_routed=True,
        )

    def _with_epsilon(self, ops: Ops, params: Mapping[str, Array], score_TE: Array, context: RouterContext) -> Array:
        kind = ops.dtype(score_TE)
        if self.config.epsilon == "bias":
            return score_TE + ops.reshape(ops.cast(params["bias"], kind), (1, -1))
        if not (self.noise and context.training):
            return score_TE
        columns = [ops.reshape(ops.cast(context.noise[name], kind), (-1, 1)) for name in self.noise]
        width = ops.constant_like(math.sqrt(12.0) / self.num_experts, score_TE)
        return score_TE + (ops.concat(columns, axis=1) - ops.constant_like(0.5, score_TE)) * width
