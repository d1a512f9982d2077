"""The interface of all routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import numpy as np
from pydantic import PositiveInt

from moeport.config.base import Section
from moeport.core.ops import Array, Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing, SoftRouting


class RouterConfig(Section):
    """Options that every router has; each router's `Config` adds its own and the literal `name`."""

    name: str
    """Name of the router."""
    sub_layers: ClassVar[int] = 1
    """Mixture-of-experts layers, one after another, that stand in place of one."""
    mixes_shared_experts: ClassVar[bool] = False
    """Whether shared experts are mixed by learned shares rather than added, unless the config says."""
    looks_ahead: ClassVar[bool] = False
    """Whether a token's routing depends on later tokens, so that a language model would read what it predicts."""
    needs_token_ids: ClassVar[bool] = False
    """Whether it looks at vocabulary ids."""

    @property
    def experts_per_token(self) -> int:
        """K: experts that compute one token."""
        raise NotImplementedError

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """Trained parameters."""
        return d_model * num_experts

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """Options that do not fit `num_experts`, as (option, what is wrong, what is expected)."""
        return []


class TopKRouterConfig(RouterConfig):
    """A router with a free number of experts a token."""

    top_k: PositiveInt = 2
    """Experts a token K; at most num_experts."""

    @property
    def experts_per_token(self) -> int:
        """K."""
        return self.top_k

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """top_k must not exceed num_experts."""
        if self.top_k > num_experts:
            return [
                (
                    "top_k",
                    "more experts a token than there are",
                    f"at most model.moe.num_experts ({num_experts})",
                )
            ]
        return []


ConfigT = TypeVar("ConfigT", bound=RouterConfig)


class Router(ABC, Generic[ConfigT]):
    """Scores tokens against experts and chooses. Holds no arrays: parameters are passed in."""

    paper: ClassVar[str]
    """Where the method is defined."""
    noise: ClassVar[tuple[str, ...]] = ()
    """Names of the uniform random numbers it wants, one a token, in training."""
    load_balance: ClassVar[float] = 0.01
    """Coefficient of the load-balancing loss unless the config sets one."""

    def __init__(
        self, config: ConfigT, d_model: int, num_experts: int, init_std: float = 0.02, vocab_size: int | None = None
    ):
        self.config = config
        self.d_model = d_model
        self.num_experts = num_experts
        self.init_std = init_std
        self.vocab_size = vocab_size

    def parameter_specs(self) -> list[ParameterSpec]:
        """Names, shapes and initial values of its parameters."""
        return [ParameterSpec("weight", (self.num_experts, self.d_model), std=self.init_std)]

    @abstractmethod
    def route(
        self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext
    ) -> Routing | SoftRouting:
        """Choose experts.

        Args:
            ops: the backend's operations.
            params: arrays by the names of `parameter_specs`.
            x_TD: hidden states (T, D) of any float type; scores are computed in float32 at least.
            context: what some routers need beside them.
        """

    def update_state(self, state: Mapping[str, np.ndarray], load_E: np.ndarray) -> dict[str, np.ndarray]:
        """New values of the untrained parameters after an optimiser step.

        Args:
            state: their values by name.
            load_E: assignments each expert was chosen for in the step, over all ranks and micro-batches.
        """
        return {}

    def logits(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """x W^T in float32 at least, (T, E)."""
        return ops.linear(ops.accurate(x_TD), params["weight"])


def assign(
    ops: Ops,
    expert_TK: Array,
    weight_TK: Array,
    logits_TE: Array,
    probs_TE: Array,
    balanced_choices: int | None = None,
    null_experts: int = 0,
    own_loss: Array | None = None,
) -> Routing:
    """A `Routing` in which every token has K choices, best first."""
    num_tokens, choices = expert_TK.shape
    return Routing(
        expert_N=ops.reshape(expert_TK, (-1,)),
        weight_N=ops.reshape(weight_TK, (-1,)),
        num_tokens=num_tokens,
        num_experts=logits_TE.shape[1] - null_experts,
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        balanced_choices=balanced_choices or choices,
        null_experts=null_experts,
        own_loss=own_loss,
    )


def normalized(ops: Ops, weight_TK: Array) -> Array:
    """Gates divided by their sum over a token's choices."""
    return weight_TK / ops.sum(weight_TK, axis=-1, keepdims=True)
