"""BASE layers: a balanced assignment of tokens to experts (Lewis et al. 2021, arXiv 2103.16716)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from moeport.core.array import Array
from moeport.core.drop import rank_in_group
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, RouterConfig, assign
from moeport.routers.sinkhorn import sinkhorn_log_plan

_STAGES, _ITERATIONS = 3, 5
"""Number of sharpness levels, each twice the previous one, and Sinkhorn iterations at each."""
_ROUNDS = 4
"""Rounds in which unassigned tokens propose to an expert that still has room."""
_EPS = 1e-12
"""Added to a variance."""


class BaseLayersConfig(RouterConfig):
    """In training, a balanced assignment that nearly maximises the total score; otherwise the best expert per token."""

    even_load: ClassVar[bool] = True

    name: Literal["base"] = "base"
    """`base`"""

    @property
    def experts_per_token(self) -> int:
        """1."""
        return 1


class BaseLayersRouter(Router[BaseLayersConfig]):
    """e is the expert that the balanced assignment gives the token, or argmax(W x) in evaluation and generation;
    the gate is sigmoid(w_e . x).

    In the paper y = a f(x) + (1 - a) x with gate a, and f(x) = x + FFN(norm(x)) in the authors' released code. That
    equals x + a FFN(norm(x)): this gate inside the residual connection. Here scores and gate are computed from
    the normalised x, there from x itself. The paper's auction finds the optimal assignment; ours comes close to it in a
    fixed number of steps and is just as balanced: expert e gets T // E tokens, plus one if e < T % E. W is
    initialised from a normal distribution like other weights; the released code uses orthogonal rows of length 0.1.
    """

    paper = "BASE Layers, arXiv 2103.16716, section 3"
    load_balance = 0.0

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The assigned expert in training, otherwise the one with the highest score."""
        logits_TE = self.logits(ops, params, x_TD)
        if context.training:
            expert_T1 = ops.reshape(balanced_assignment(ops, logits_TE), (-1, 1))
        else:
            expert_T1 = ops.topk_ids(logits_TE, 1)
        gate_T1 = ops.sigmoid(ops.take_last(logits_TE, expert_T1))
        return assign(ops, expert_T1, gate_T1, logits_TE, ops.softmax(logits_TE), all_routed=True)


def balanced_assignment(ops: Ops, scores_TE: Array) -> Array:
    """An expert for each token, (T,): T // E tokens per expert and one more for the first T % E experts, with almost
    the largest total score. Carries no gradient.

    A Sinkhorn plan of the scores is sharpened in stages until almost every token favours one expert. Then each token
    proposes to the expert with room of which it has the largest share, and each expert accepts the tokens with the
    largest shares. After a few rounds the remaining tokens fill the free places in order.
    """
    tokens, experts = scores_TE.shape
    scores_TE = ops.stop_gradient(scores_TE)
    centred_TE = scores_TE - ops.mean(scores_TE)
    variance = ops.mean(centred_TE * centred_TE)
    log_plan_TE = centred_TE * ops.rsqrt(variance + ops.constant_like(_EPS, variance))
    for _ in range(_STAGES):
        log_plan_TE = sinkhorn_log_plan(ops, log_plan_TE * ops.constant_like(2.0, log_plan_TE), _ITERATIONS)

    unrouted, zero = ops.index(experts), ops.index(0)
    plan_TE = ops.exp(log_plan_TE)
    never = ops.constant_like(-1.0, plan_TE)
    share, rest = tokens // experts, tokens % experts
    room_E = ops.where(ops.arange(experts) < ops.index(rest), ops.index(share + 1), ops.index(share))
    chosen_T = ops.arange(tokens) * zero + unrouted
    for _ in range(_ROUNDS):
        open_TE = ops.where(ops.reshape(room_E > zero, (1, experts)), plan_TE, never)
        best_T1 = ops.topk_ids(open_TE, 1)
        share_T = ops.reshape(ops.take_last(open_TE, best_T1), (-1,))
        proposed_T = ops.where(chosen_T == unrouted, ops.reshape(best_T1, (-1,)), unrouted)
        room_of_T = ops.take_rows(ops.concat([room_E, ops.arange(1)], axis=0), proposed_T)
        taken_T = _rank(ops, proposed_T, share_T, experts + 1) < room_of_T
        room_E = room_E - ops.bincount(ops.where(taken_T, proposed_T, unrouted), experts + 1)[:experts]
        chosen_T = ops.where(taken_T, proposed_T, chosen_T)

    left_T = chosen_T == unrouted
    number_T = ops.cumsum(ops.where(left_T, ops.index(1), zero), axis=0) - ops.index(1)
    # Free place n belongs to the expert before which at most n free places end.
    ends = ops.bincount(ops.cumsum(room_E, axis=0), tokens + 1)
    expert_of_place = ops.cumsum(ends, axis=0)
    rest_T = ops.take_rows(expert_of_place, ops.where(left_T, number_T, zero))
    return ops.where(left_T, rest_T, chosen_T)


def _rank(ops: Ops, group_T: Array, score_T: Array, groups: int) -> Array:
    """Rank of each entry by score within its group, 0 being the highest; ties go to the lower index."""
    by_score = ops.argsort(score_T, descending=True)
    return ops.take_rows(rank_in_group(ops, ops.take_rows(group_T, by_score), groups), ops.inverse(by_score))
