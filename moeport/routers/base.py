"""The interface of all routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar, get_args

import numpy as np
from pydantic import PositiveInt
from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing, SoftRouting
from moeport.core.section import Section


class RouterConfig(Section, ABC):
    """Options that every router has; each router's `Config` adds its own and the literal `name`."""

    name: str
    """Name of the router."""
    nodes: PositiveInt | None = None
    """Number of nodes to simulate, at most num_experts: token t of T belongs to node t * nodes // T. Ours, to study
    locality on one machine. Default: the nodes of the cluster."""
    sub_layers: ClassVar[int] = 1
    """How many consecutive mixture-of-experts layers replace one."""
    mixes_shared_experts: ClassVar[bool] = False
    """Whether shared experts are mixed in by learned shares rather than added, unless the config says otherwise."""
    looks_ahead: ClassVar[bool] = False
    """Whether a token's routing depends on later tokens, so that a language model would see what it predicts."""
    needs_token_ids: ClassVar[bool] = False
    """Whether it looks at vocabulary ids."""
    fixed_load: ClassVar[bool] = False
    """Whether every expert always computes the same number of rows, so that a capacity has no effect."""
    even_load: ClassVar[bool] = False
    """Whether the load is even by construction in training, where a load-balancing loss would have no gradient."""
    passes: ClassVar[int] = 1
    """How often a batch passes through the model in training, each time with different noise; the losses are added.
    At most 2."""
    splits_width: ClassVar[bool] = False
    """Whether each expert has an equal share of the features, so that num_experts must divide d_model."""
    may_use_fewer: ClassVar[bool] = False
    """Whether some tokens may get fewer than K experts even without a capacity limit."""
    gates_follow_probs: ClassVar[bool] = False
    """Whether every token chooses K different experts and its gates are in proportion to its normalised scores, which
    capacity policy `round` continues to the experts that it did not choose."""
    new_defaults: ClassVar[tuple[str, ...]] = ()
    """Options whose default was another in earlier versions: a run keeps what it has where its config leaves them open.
    A config that gives every other option, as those that moeport writes do, but not these is of such a version."""
    has_affinity: ClassVar[bool] = False
    """Whether it returns affinities, which drop policy `affinity` needs."""
    has_gate_rows: ClassVar[bool] = False
    """Whether each expert has a gate row to which a token has a cosine, which estimated capacities need."""

    @property
    @abstractmethod
    def experts_per_token(self) -> int:
        """K: experts that compute one token; where experts choose tokens, the mean number, rounded."""

    @property
    def consistency_weight(self) -> float:
        """Weight of the divergence between the outputs of two passes."""
        return 0.0

    def assignments(self, num_tokens: int, num_experts: int, num_sequences: int) -> int:
        """Assignments of a batch, including those that are unrouted."""
        return num_tokens * self.experts_per_token

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """Number of trained parameters."""
        return d_model * num_experts

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """Options that do not fit `num_experts`, as (option, what is wrong, what is expected)."""
        if self.nodes is not None and self.nodes > num_experts:
            return [("nodes", "leaves nodes without an expert", f"at most model.moe.num_experts ({num_experts})")]
        return []

    def warnings(self, num_experts: int) -> list[tuple[str, str, str]]:
        """Options that are valid but rarely meant, as (option, what they do, what to set instead)."""
        return []


class TopKRouterConfig(RouterConfig):
    """A router with a configurable number of experts per token."""

    single_gate: ClassVar[str] = ""
    """How to keep a single gate from being divided by itself; empty where no option does."""
    top_k: PositiveInt = 2
    """Experts per token K; at most num_experts."""

    @property
    def experts_per_token(self) -> int:
        """K."""
        return self.top_k

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the gates of a token sum to 1, so that a single one is 1 whatever the router says."""
        return False

    @override
    def warnings(self, num_experts: int) -> list[tuple[str, str, str]]:
        if self.top_k > 1 or num_experts == 1 or not self.gates_sum_to_one:
            return []
        frozen = "a single gate divided by itself is 1, so only auxiliary losses train the router"
        instead = f"{self.single_gate}, or top_k to 2 or more" if self.single_gate else "it to 2 or more"
        return [("top_k", frozen, instead)]

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """top_k must not exceed num_experts."""
        found = super().problems(num_experts)
        if self.top_k > num_experts:
            expected = f"at most model.moe.num_experts ({num_experts})"
            found.append(("top_k", "more experts per token than there are", expected))
        return found


ConfigT = TypeVar("ConfigT", bound=RouterConfig)

SHORTEST = 1e-3
"""Length below which `unit` does not lengthen a vector further: the root of what Soft MoE's released code adds to a
squared length."""


class Router(ABC, Generic[ConfigT]):
    """Scores tokens against experts and chooses. Holds no arrays: parameters are passed in."""

    config_class: ClassVar[type[RouterConfig]]
    """Its config, read from the base class: `class SwitchRouter(Router[SwitchConfig])`."""
    paper: ClassVar[str]
    """Where the method is defined."""
    noise: tuple[str, ...] = ()
    """Names of the random numbers it needs in training, one number per token each: uniform, or normal where the name
    begins with `moeport.core.parameters.NORMAL`."""
    load_balance: float = 0.01
    """Default coefficient of the load-balancing loss."""
    in_compute_type: bool = False
    """Whether its matrix products take operands in the type of the hidden states, not in float32."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, RouterConfig):
                    cls.config_class = argument

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
            x_TD: hidden states (T, D) of any float type; scores are computed in float32 or wider.
            context: what some routers need besides the hidden states.
        """

    def update_state(self, state: Mapping[str, np.ndarray], load_E: np.ndarray) -> dict[str, np.ndarray]:
        """New values of the untrained parameters after an optimiser step.

        Args:
            state: their values by name.
            load_E: assignments to each expert in the step, before drops, over all ranks and micro-batches.
        """
        return {}

    @property
    def gate_dim(self) -> int:
        """Dimension of the space in which `gate_cosines` compares."""
        return self.d_model

    def gate_cosines(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """Cosine of each token and each expert's gate row, (T, E), in float32 or wider; no gradient is needed.

        For routers whose config sets `has_gate_rows`. By default the gate rows are the first E rows of `weight`.
        """
        x_TD = unit(ops, ops.accurate(ops.stop_gradient(x_TD)))
        rows_ED = ops.cast(ops.stop_gradient(params["weight"][: self.num_experts]), ops.dtype(x_TD))
        return ops.linear(x_TD, unit(ops, rows_ED))

    def logits(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """x W^T in float32 or wider, (T, E)."""
        return self.product(ops, x_TD, params["weight"])

    def product(self, ops: Ops, x_TD: Array, weight: Array) -> Array:
        """x @ weight^T in float32 or wider, from operands of the type that `model.moe.router_dtype` says."""
        if self.in_compute_type:
            return ops.linear_accurate(x_TD, weight)
        return ops.linear(ops.accurate(x_TD), weight)


def assign(
    ops: Ops,
    expert_TK: Array,
    weight_TK: Array,
    logits_TE: Array,
    probs_TE: Array,
    balanced_choices: int | None = None,
    null_experts: int = 0,
    own_loss: Array | None = None,
    affinity_TK: Array | None = None,
    all_routed: bool = False,
) -> Routing:
    """A `Routing` in which every token has K choices, best first.

    `all_routed` promises that each of them is an expert: no entry of `expert_TK` is E, whatever the scores.
    """
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
        affinity_N=None if affinity_TK is None else ops.reshape(affinity_TK, (-1,)),
        all_routed=all_routed,
    )


def normalized(ops: Ops, weight_TK: Array) -> Array:
    """Gates divided by their sum over each token's choices."""
    return weight_TK / ops.sum(weight_TK, axis=-1, keepdims=True)


def sum_of_better(ops: Ops, weight_TK: Array) -> Array:
    """For each choice, the sum of the weights before it, without gradient.

    Added one by one, so that all backends round alike.
    """
    fixed_TK = ops.stop_gradient(weight_TK)
    sums = [ops.zeros((weight_TK.shape[0], 1), ops.dtype(weight_TK))]
    for choice in range(weight_TK.shape[1] - 1):
        sums.append(sums[-1] + fixed_TK[:, choice : choice + 1])
    return ops.concat(sums, axis=1)


def unit(ops: Ops, x: Array) -> Array:
    """x divided by its length along the last dimension, or by `SHORTEST` if that is longer.

    So zeros stay zeros, and no gradient grows by more than 1 / SHORTEST.
    """
    square, least = ops.sum(x * x, axis=-1, keepdims=True), ops.constant_like(SHORTEST**2, x)
    return x * ops.rsqrt(ops.where(square > least, square, least))
