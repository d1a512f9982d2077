"""BASE layers: a balanced assignment of tokens to experts (Lewis et al. 2021, arXiv 2103.16716)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, RouterConfig, assign
from moeport.routers.sinkhorn import sinkhorn_log_plan

_STAGES, _ITERATIONS = 3, 5
"""Sinkhorn iterations at each of so many sharpnesses, each twice the one before."""
_ROUNDS = 4
"""Rounds in which the tokens that are left propose to an expert with room."""
_EPS = 1e-12
"""Added to a variance."""


class BaseLayersConfig(RouterConfig):
    """In training each expert gets the same number of tokens, those that suit it in sum; else the best expert."""

    even_load: ClassVar[bool] = True

    name: Literal["base"] = "base"
    """`base`"""

    @property
    def experts_per_token(self) -> int:
        """1."""
        return 1


class BaseLayersRouter(Router[BaseLayersConfig]):
    """e = the expert that the balanced assignment gives the token, in evaluation and generation argmax(W x); gate
    sigmoid(w_e . x).

    In the paper y = a f(x) + (1 - a) x with a the gate, and f(x) = x + FFN(norm(x)) in the authors' released code: that
    is x + a FFN(norm(x)), this gate within the residual connection. Scores and gate are of the normalised x here, of x
    itself there. The paper's assignment is an auction that ends at the best one; ours comes near to it in a fixed
    number of steps, and is as exactly balanced: expert e gets T // E tokens, and one more if e < T % E. The initial
    values of W are normal as those of other weights, where the released code has orthogonal rows of length 0.1.
    """

    paper = "BASE Layers, arXiv 2103.16716, section 3"
    load_balance = 0.0

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The assigned expert in training, else that of highest score."""
        logits_TE = self.logits(ops, params, x_TD)
        if context.training:
            expert_T1 = ops.reshape(balanced_assignment(ops, logits_TE), (-1, 1))
        else:
            expert_T1 = ops.topk_ids(logits_TE, 1)
        gate_T1 = ops.sigmoid(ops.take_last(logits_TE, expert_T1))
        return assign(ops, expert_T1, gate_T1, logits_TE, ops.softmax(logits_TE))


def balanced_assignment(ops: Ops, scores_TE: Array) -> Array:
    """An expert for each token, (T,), with T // E tokens an expert and one more for the first T % E, of nearly the
    largest sum of scores. Without gradient.

    A Sinkhorn plan of the scores is sharpened in stages, which leaves all but a few tokens with one expert. Then each
    token proposes to the expert of its largest share that has room, and an expert takes the surest; after some rounds
    the tokens that are left fill the free places in order.
    """
    tokens, experts = scores_TE.shape
    scores_TE = ops.stop_gradient(scores_TE)
    centred_TE = scores_TE - ops.mean(scores_TE)
    variance = ops.mean(centred_TE * centred_TE)
    log_plan_TE = centred_TE * ops.rsqrt(variance + ops.constant_like(_EPS, variance))
    for _ in range(_STAGES):
        log_plan_TE = sinkhorn_log_plan(ops, log_plan_TE * ops.constant_like(2.0, log_plan_TE), _ITERATIONS)

    nowhere, zero = ops.index(experts), ops.index(0)
    plan_TE = ops.exp(log_plan_TE)
    never = ops.constant_like(-1.0, plan_TE)
    room_E = ops.from_numpy(np.array([tokens // experts + (expert < tokens % experts) for expert in range(experts)]))
    chosen_T = ops.from_numpy(np.full(tokens, experts))
    for _ in range(_ROUNDS):
        open_TE = ops.where(ops.reshape(room_E > zero, (1, experts)), plan_TE, never)
        best_T1 = ops.topk_ids(open_TE, 1)
        share_T = ops.reshape(ops.take_last(open_TE, best_T1), (-1,))
        proposed_T = ops.where(chosen_T == nowhere, ops.reshape(best_T1, (-1,)), nowhere)
        room_of_T = ops.take_rows(ops.concat([room_E, ops.from_numpy(np.zeros(1, int))], axis=0), proposed_T)
        taken_T = _rank(ops, proposed_T, share_T, experts + 1) < room_of_T
        room_E = room_E - ops.bincount(ops.where(taken_T, proposed_T, nowhere), experts + 1)[:experts]
        chosen_T = ops.where(taken_T, proposed_T, chosen_T)

    left_T = chosen_T == nowhere
    number_T = ops.cumsum(ops.where(left_T, ops.index(1), zero), axis=0) - ops.index(1)
    # Place n among the free ones is with the expert before which n or fewer places end.
    ends = ops.bincount(ops.cumsum(room_E, axis=0), tokens + 1)
    expert_of_place = ops.cumsum(ends, axis=0)
    rest_T = ops.take_rows(expert_of_place, ops.where(left_T, number_T, zero))
    return ops.where(left_T, rest_T, chosen_T)


def _rank(ops: Ops, group_T: Array, score_T: Array, groups: int) -> Array:
    """Place of each entry among those of its group by score, 0 the highest; of equal ones the lower index first."""
    by_score = ops.argsort(score_T, descending=True)
    order = ops.take_rows(by_score, ops.argsort(ops.take_rows(group_T, by_score)))
    counts = ops.bincount(group_T, groups)
    first = ops.cumsum(counts, axis=0) - counts
    rank = ops.arange(group_T.shape[0]) - ops.take_rows(first, ops.take_rows(group_T, order))
    return ops.take_rows(rank, ops.argsort(order))
