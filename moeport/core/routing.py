"""Routing: which token goes to which expert with which weight.

Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moeport.core.ops import Array


@dataclass(frozen=True)
class Routing:
    """Sparse assignments of tokens to experts, in token-major order: token 0's K choices, best first, then token 1's.

    `expert_N` may be num_experts, "nowhere": the assignment is not served and its weight is 0. Dropped assignments,
    and those a router declines, are of this kind.
    """

    expert_N: Array
    """Expert of each assignment, 0 .. E; E is nowhere."""
    weight_N: Array
    """Gate of each assignment, differentiable; float32 at least."""
    num_tokens: int
    """T."""
    num_experts: int
    """E."""
    logits_TE: Array
    """Scores before the softmax or sigmoid, for the router z-loss; null experts come last."""
    probs_TE: Array
    """Scores normalised over experts, for the load-balancing loss; null experts come last."""
    balanced_choices: int
    """How many leading choices of each token the load-balancing loss counts."""
    null_experts: int = 0
    """Experts that compute nothing, beyond the E: they have scores, and a choice of one of them is nowhere."""
    own_loss: Array | None = None
    """A loss that only this router has, already weighted; a scalar."""

    @property
    def choices_per_token(self) -> int:
        """K."""
        return self.expert_N.shape[0] // self.num_tokens


@dataclass(frozen=True)
class RouterContext:
    """What some routers need beside the hidden states."""

    layer: int
    """Index of the block."""
    training: bool
    """False during evaluation and generation."""
    token_ids_T: Array | None = None
    """Vocabulary ids of the tokens, where the caller has them."""
    noise: dict[str, Array] = field(default_factory=dict)
    """Uniform numbers in [0, 1) of shape (T,), by the names in `Router.noise`; empty outside training."""
