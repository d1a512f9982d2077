"""Normal noise on the logits in training, as in V-MoE (Riquelme et al. 2021, arXiv 2106.05974, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import NonNegativeFloat

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import NORMAL
from moeport.core.routing import RouterContext
from moeport.routers.base import Router, RouterConfig


class LogitNoiseConfig(RouterConfig):
    """A router that may add noise to its logits in training."""

    noise_std: NonNegativeFloat = 0.0
    """In training, the logits get normal noise of this standard deviation over num_experts, before softmax and choice.
    0: none. V-MoE's released code has 1."""


NoisyT = TypeVar("NoisyT", bound=LogitNoiseConfig)


class LogitNoiseRouter(Router[NoisyT]):
    """A router whose logits may get noise in training."""

    def __init__(
        self, config: NoisyT, d_model: int, num_experts: int, init_std: float = 0.02, vocab_size: int | None = None
    ):
        super().__init__(config, d_model, num_experts, init_std, vocab_size)
        if config.noise_std:
            self.noise = tuple(f"{NORMAL}logit_{expert}" for expert in range(num_experts))

    def noisy_logits(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Array:
        """x W^T, in training with noise, (T, E)."""
        logits_TE = self.logits(ops, params, x_TD)
        if not (self.noise and context.training):
            return logits_TE
        kind = ops.dtype(logits_TE)
        columns = [ops.reshape(ops.cast(context.noise[name], kind), (-1, 1)) for name in self.noise]
        std = ops.constant_like(self.config.noise_std / self.num_experts, logits_TE)
        return logits_TE + ops.concat(columns, axis=1) * std
