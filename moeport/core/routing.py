"""Routing: which token goes to which expert with which weight.

Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moeport.core.array import Array


@dataclass(frozen=True)
class Routing:
    """Sparse assignments of tokens to experts, in token-major order: token 0's K choices, best first, then token 1's.

    Where experts choose tokens there is no K, and `token_N` holds the token of each assignment.

    An `expert_N` of num_experts means unrouted: no expert serves the assignment and its weight is 0. Assignments that
    are dropped, or that a router declines, are unrouted.
    """

    expert_N: Array
    """Expert of each assignment, 0 .. E; E means unrouted."""
    weight_N: Array
    """Gate of each assignment, differentiable; float32 or wider."""
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
    token_N: Array | None = None
    """Token of each assignment, where experts choose tokens and the order differs; None: token-major."""
    null_experts: int = 0
    """Experts beyond the E that compute nothing: they have scores, and choosing one leaves the assignment unrouted."""
    own_loss: Array | None = None
    """A loss that only this router has, already weighted; a scalar."""
    affinity_N: Array | None = None
    """How near each assignment's token is to its expert, for drop policy `affinity`; None: the router has none."""
    cosine_TE: Array | None = None
    """Cosines of tokens and gate rows, for estimated capacities; None for other policies."""
    all_routed: bool = False
    """Whether no assignment can be unrouted, whatever the scores; from the config, never from data."""
    balances_scores: bool = False
    """Whether the load-balancing loss counts the experts of highest `probs_TE`, whatever was chosen."""

    @property
    def choices_per_token(self) -> int | None:
        """K; None where experts choose tokens."""
        return None if self.token_N is not None else self.expert_N.shape[0] // self.num_tokens


@dataclass(frozen=True)
class SoftRouting:
    """Every expert has slots, and every slot is a weighted mean of the tokens of one sequence (Soft MoE).

    A sequence has R slots: those of expert 0, then those of expert 1, ...
    """

    dispatch_BSR: Array
    """Share of each token in each slot; sums to 1 over the tokens of a sequence."""
    combine_BSR: Array
    """Share of each slot in each token's output; sums to 1 over the slots."""
    num_experts: int
    """E."""
    logits_TE: Array
    """Scores before the softmax (T, R), for the router z-loss."""


class Topology(NamedTuple):
    """Where this process and the experts are."""

    nodes: int = 1
    """Machines that the experts are spread over; expert e of E is on node e * nodes // E."""
    node: int = 0
    """The machine of this process."""
    job_nodes: int = 1
    """Machines of the whole job, which may have several copies of the experts."""


ONE_PROCESS = Topology()


def of_node(node: int, nodes: int, items: int) -> tuple[int, int]:
    """The first of a node's experts, or simulated tokens, and the first after them: i is on node i * nodes // items."""
    return -(-node * items // nodes), -(-(node + 1) * items // nodes)


@dataclass(frozen=True)
class RouterContext:
    """What some routers need besides the hidden states."""

    layer: int
    """Index of the block."""
    training: bool
    """False during evaluation and generation."""
    token_ids_T: Array | None = None
    """Vocabulary ids of the tokens, if the caller has them."""
    noise: Mapping[str, Array] = field(default_factory=dict)
    """Numbers of shape (T,) by the names in `Router.noise`, uniform in [0, 1) or normal; empty outside training."""
    num_sequences: int = 1
    """Number of sequences, of equal length, that make up the T tokens."""
    topology: Topology = ONE_PROCESS
    """Where tokens and experts are."""
    pass_number: int = 0
    """Which of the router's `passes` this is, from 0."""
    position_T: Array | None = None
    """Position of each token in its text, where the sequences continue texts; None: each sequence is a text."""
    first_id_T: Array | None = None
    """Vocabulary id of the first token of each token's text, likewise."""
    domain_B: Array | None = None
    """Number of each sequence's domain; None: unknown."""
    keeps_choices: bool = False
    """Whether the trainer is to see which experts each token chose."""

    @property
    def continues(self) -> bool:
        """Whether the sequences continue texts; then only the output is wanted, and nothing is measured."""
        return self.position_T is not None
