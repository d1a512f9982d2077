"""Expert choice: each expert takes its best tokens (Zhou et al. 2022, arXiv 2202.09368), and its variants' base."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

from pydantic import PositiveFloat, PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.rounding import up_to_multiple
from moeport.core.routing import RouterContext, Routing
from moeport.routers.noise import LogitNoiseConfig, LogitNoiseRouter


class ExpertsChooseConfig(LogitNoiseConfig):
    """Options of every router in which experts choose tokens."""

    looks_ahead: ClassVar[bool] = True
    fixed_load: ClassVar[bool] = True
    even_load: ClassVar[bool] = True

    mean_experts: PositiveFloat = 2.0
    """Mean number of experts per token, which the papers call the capacity factor: each expert takes C =
    ceil(mean_experts * S / num_experts) of a group's S tokens; at most num_experts."""
    group: Literal["sequence", "batch"] = "sequence"
    """The tokens from which an expert takes C: each sequence or image separately, or the whole micro-batch."""
    multiple_of: PositiveInt = 1
    """C is rounded up to a multiple of this, but is at most S. V-MoE's released code has 4."""

    @property
    def experts_per_token(self) -> int:
        """`mean_experts`, rounded, and at least 1."""
        return max(1, round(self.mean_experts))

    def groups(self, num_sequences: int) -> int:
        """Number of groups G in a batch."""
        return num_sequences if self.group == "sequence" else 1

    def capacity(self, group_tokens: int, num_experts: int) -> int:
        """C: tokens of a group that each expert takes."""
        rows = math.ceil(self.mean_experts * group_tokens / num_experts)
        return min(up_to_multiple(rows, self.multiple_of), group_tokens)

    def assignments(self, num_tokens: int, num_experts: int, num_sequences: int) -> int:
        """G * E * C."""
        groups = self.groups(num_sequences)
        return groups * num_experts * self.capacity(num_tokens // groups, num_experts)

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """A token cannot have more experts than there are."""
        found = super().problems(num_experts)
        if self.mean_experts <= num_experts:
            return found
        return [
            *found,
            (
                "mean_experts",
                "more experts per token than there are",
                f"at most model.moe.num_experts ({num_experts})",
            ),
        ]


ConfigT = TypeVar("ConfigT", bound=ExpertsChooseConfig)


class ExpertsChooseRouter(LogitNoiseRouter[ConfigT]):
    """Each expert takes the C tokens of a group that it scores highest; how many experts a token gets varies."""

    load_balance = 0.0

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The C highest-scoring tokens of each expert in each group, with softmax gates."""
        logits_TE = self.noisy_logits(ops, params, x_TD, context)
        probs_TE = ops.softmax(logits_TE)
        (tokens, experts), groups = logits_TE.shape, self.config.groups(context.num_sequences)
        size = tokens // groups
        capacity = self.config.capacity(size, experts)
        logits_GSE, probs_GSE = (ops.reshape(x_TE, (groups, size, experts)) for x_TE in (logits_TE, probs_TE))
        token_GEC = ops.topk_ids(self.scores(ops, logits_GSE, probs_GSE), capacity)
        weight_GEC = ops.take_last(ops.transpose(probs_GSE, (0, 2, 1)), token_GEC)
        # (group, expert) of each row of C assignments
        row = ops.arange(groups * experts)
        group = row // ops.index(experts)
        expert = row - group * ops.index(experts)
        return Routing(
            expert_N=ops.take_rows(expert, ops.arange(groups * experts * capacity) // ops.index(capacity)),
            weight_N=ops.reshape(weight_GEC, (-1,)),
            num_tokens=tokens,
            num_experts=experts,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            balanced_choices=0,
            token_N=ops.reshape(token_GEC + ops.reshape(group * ops.index(size), (groups, experts, 1)), (-1,)),
            all_routed=True,
        )

    @abstractmethod
    def scores(self, ops: Ops, logits_GSE: Array, probs_GSE: Array) -> Array:
        """Scores by which an expert ranks the tokens of a group, (G, E, S).

        Args:
            ops: the backend's operations.
            logits_GSE: x W^T.
            probs_GSE: softmax of the logits over the experts.
        """


class ExpertChoiceConfig(ExpertsChooseConfig):
    """Each expert takes its highest-scoring tokens: the load is even, the number of experts per token is not."""

    name: Literal["expert_choice"] = "expert_choice"
    """`expert_choice`"""


class ExpertChoiceRouter(ExpertsChooseRouter[ExpertChoiceConfig]):
    """p = softmax(W x) over the experts; expert e takes the C tokens of a group with the largest p_e; gates p_e.

    A token that no expert takes passes through the residual connection alone.
    """

    paper = "Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368, section 3.2"

    def scores(self, ops: Ops, logits_GSE: Array, probs_GSE: Array) -> Array:
        """p."""
        return ops.transpose(probs_GSE, (0, 2, 1))
