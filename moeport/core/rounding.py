"""Token rounding: every expert serves a multiple of the rows that a tile of a grouped product has.

SonicMoE (arXiv 2512.14080), token rounding to the nearest multiple. Shape suffixes as in `moeport.core.ops`; J places
that an expert may fill.
"""

from __future__ import annotations

from dataclasses import replace

from moeport.core.array import Array
from moeport.core.drop import keep_best
from moeport.core.ops import Ops
from moeport.core.routing import Routing


def up_to_multiple(rows: int, of: int) -> int:
    """The lowest multiple of `of` that is at least `rows`."""
    return -(-rows // of) * of


def rounded_rows(ops: Ops, counts_E: Array, tile: int, num_tokens: int) -> Array:
    """The multiple of `tile` that is nearest to each count, (E,) of the index type, but at most all tokens.

    A count in the middle goes to the even number of tiles, as torch.round takes it in the authors' code.
    """
    whole_E = counts_E // ops.index(tile)
    rest_E = (counts_E - whole_E * ops.index(tile)) * ops.index(2)
    odd_E = whole_E - whole_E // ops.index(2) * ops.index(2)
    up_E = ops.where(rest_E + odd_E > ops.index(tile), ops.index(1), ops.index(0))
    rows_E = (whole_E + up_E) * ops.index(tile)
    return ops.where(rows_E < ops.index(num_tokens), rows_E, ops.index(num_tokens))


def round_to_tile(ops: Ops, routing: Routing, tile: int) -> tuple[Routing, Routing]:
    """Drop or fill, whichever is nearer, until every expert has a multiple of `tile` rows.

    An expert that rounds down drops the assignments with the lowest gates. One that rounds up takes the tokens that did
    not choose it and have the largest p of it. As in the authors' code, all tokens of the micro-batch take part, those
    that chose the expert come first, and gates are not renormalised. Ours: ties go to the earlier position; the gate
    of a token that fills is p times the ratio of its own gates to their p, so that gates which a router has normalised
    are continued.

    Args:
        ops: the backend's operations.
        routing: what a router chose in which tokens choose different experts each, with gates in proportion to p.
        tile: rows of a tile, at least 2.

    Returns: (what is left of the choices, in the same order; the same followed by E * J assignments that fill, most of
    them unrouted, with J = min(tile // 2, T)).
    """
    experts, tokens = routing.num_experts, routing.num_tokens
    counts_E = ops.bincount(routing.expert_N, experts + 1)[:experts]
    rows_E = rounded_rows(ops, counts_E, tile, tokens)
    kept = keep_best(ops, routing, rows_E)
    places = min(tile // 2, tokens)
    expert_TK = ops.reshape(routing.expert_N, (tokens, -1))
    weight_TK = ops.reshape(routing.weight_N, (tokens, -1))
    token_EJ = ops.topk_ids(_of_others(ops, routing, expert_TK), places)
    fills_EJ = ops.reshape(ops.arange(places), (1, -1)) < ops.reshape(rows_E - counts_E, (-1, 1))
    expert_EJ = ops.reshape(ops.arange(experts), (-1, 1)) + ops.reshape(ops.arange(places) * ops.index(0), (1, -1))
    scale_T = ops.sum(weight_TK, axis=-1) / ops.sum(ops.take_last(routing.probs_TE, expert_TK), axis=-1)
    share_EJ = ops.take_last(ops.transpose(routing.probs_TE, (1, 0)), token_EJ)
    gate_EJ = share_EJ * ops.take_rows(scale_T, token_EJ)
    number_N = ops.arange(tokens * expert_TK.shape[1])
    filled = replace(
        kept,
        expert_N=_joined(ops, kept.expert_N, ops.where(fills_EJ, expert_EJ, ops.index(experts))),
        weight_N=_joined(ops, kept.weight_N, ops.where(fills_EJ, gate_EJ, ops.constant_like(0.0, gate_EJ))),
        token_N=_joined(ops, number_N // ops.index(expert_TK.shape[1]), token_EJ),
        affinity_N=None,
    )
    return kept, filled


def _of_others(ops: Ops, routing: Routing, expert_TK: Array) -> Array:
    """p of each expert and token, (E, T), without gradient; -1 where the token chose the expert."""
    probs_TE = ops.stop_gradient(routing.probs_TE)
    expert_E = ops.reshape(ops.arange(routing.num_experts), (1, -1))
    for choice in range(expert_TK.shape[1]):
        chosen_TE = expert_TK[:, choice : choice + 1] == expert_E
        probs_TE = ops.where(chosen_TE, ops.constant_like(-1.0, probs_TE), probs_TE)
    return ops.transpose(probs_TE, (1, 0))


def _joined(ops: Ops, first_N: Array, second: Array) -> Array:
    return ops.concat([first_N, ops.reshape(second, (-1,))], axis=0)
