"""Auxiliary losses of routers, and cross entropy by weight. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing


def chosen_counts(ops: Ops, expert_N: Array, num_experts: int) -> Array:
    """Assignments per expert, (E,) of the index type; unrouted ones are not counted."""
    return ops.bincount(expert_N, num_experts + 1)[:num_experts]


def load_balance_loss(
    ops: Ops,
    routing: Routing,
    num_sequences: int,
    over_ranks: Callable[[Array], Array] | None = None,
    chosen_E: Array | None = None,
) -> Array:
    """E * sum_e f_e P_e, averaged over sequences (Switch Transformer, eq. 4 to 6).

    f_e is the share of the counted choices that went to expert e, before any drops; P_e is the mean normalised score.
    With num_sequences = 1 this is Switch's loss over the batch; with the number of sequences in the batch it is
    DeepSeek-V3's sequence-wise loss (eq. 17 to 20). With `over_ranks`, which averages an array over ranks, f is
    computed from the tokens of all ranks, so that the mean of the ranks' losses is the loss of all their tokens (Demons
    in the Detail, arXiv 2501.11873). The loss is 1 at perfect balance. The gradient flows through P only.
    Where the choice is not that of the highest scores, DeepSeek-V3 counts the latter (eq. 18), and so does Megatron-LM:
    `Routing.balances_scores`.
    Null experts take part, each with the mean of their shares, since null experts are interchangeable (AdaMoE, arXiv
    2406.13233, eq. 6, where f is K times ours).

    f comes from counts, so no array of tokens by experts is allocated for it. If the caller has counted all
    assignments per expert already, it passes them as `chosen_E`.
    """
    experts, counted, nulls = routing.num_experts, routing.balanced_choices, routing.null_experts
    probs_TE = routing.probs_TE
    length = ops.constant_like(float(routing.num_tokens // num_sequences), probs_TE)

    def share(counts: Array, of: int) -> Array:
        return ops.cast(counts, ops.dtype(probs_TE)) * ops.constant_like(1.0 / of, probs_TE) / length

    all_counted = counted == routing.choices_per_token and not (nulls or routing.balances_scores)
    if chosen_E is not None and num_sequences == 1 and all_counted:
        f_BE = share(ops.reshape(chosen_E, (1, experts)), counted)
    else:
        counts_BE = _sequence_counts(ops, routing, num_sequences)
        f_BE = share(counts_BE[:, :experts], counted)
        if nulls:
            f_BE = ops.concat([f_BE, *[share(counts_BE[:, experts:], counted * nulls)] * nulls], axis=1)
    if over_ranks is not None:
        f_BE = over_ranks(f_BE)
    p_BE = ops.mean(ops.reshape(probs_TE, (num_sequences, -1, experts + nulls)), axis=1)
    balance = ops.mean(ops.sum(ops.stop_gradient(f_BE) * p_BE, axis=1))
    return ops.constant_like(float(experts + nulls), probs_TE) * balance


def _sequence_counts(ops: Ops, routing: Routing, num_sequences: int) -> Array:
    """The counted choices of each sequence by expert, (B, E + 1); unrouted ones come last."""
    if routing.balances_scores:
        choice_TK = ops.topk_ids(ops.stop_gradient(routing.probs_TE), routing.balanced_choices)
    else:
        choice_TK = ops.reshape(routing.expert_N, (routing.num_tokens, -1))[:, : routing.balanced_choices]
    length, groups = routing.num_tokens // num_sequences, routing.num_experts + 1
    sequence_T1 = ops.reshape(ops.arange(routing.num_tokens) // ops.index(length), (-1, 1))
    group_N = ops.reshape(sequence_T1 * ops.index(groups) + choice_TK, (-1,))
    return ops.reshape(ops.bincount(group_N, num_sequences * groups), (num_sequences, groups))


def z_loss(ops: Ops, log_partition_T: Array) -> Array:
    """mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return ops.mean(log_partition_T * log_partition_T)


def symmetric_divergence(ops: Ops, logits_TV: Array, other_TV: Array) -> Array:
    """(KL(p, q) + KL(q, p)) / 2 for p and q the softmax of the two logits, mean over tokens (THOR, arXiv 2110.04260).

    Computed as the sum over the vocabulary of (p - q) (log p - log q), where the log-partitions cancel.
    """
    first, second = ops.accurate(logits_TV), ops.accurate(other_TV)
    both_T = ops.sum((ops.softmax(first) - ops.softmax(second)) * (first - second), axis=-1)
    return ops.mean(both_T) * ops.constant_like(0.5, both_T)


def weighted_cross_entropy(
    ops: Ops, x_TD: Array, weight_VD: Array, target_T: Array, weight_T: Array, z_weight: float
) -> tuple[Array, Array, Array]:
    """`Ops.linear_cross_entropy_by_token` with a weight for each token: 0, or one number w that all others share.

    A token of weight 0 is given a hidden state of 0. Its logits are then 0, its loss log V and its log-partition log V,
    whatever its target, and neither the projection nor its hidden state has a gradient from it. So the means over all
    tokens, times w, less those constants are the weighted means, and every fused kernel serves as it is.

    Args:
        ops: operations.
        x_TD: final hidden states.
        weight_VD: output projection.
        target_T: ids of the target tokens.
        weight_T: weights of the tokens.
        z_weight: weight of the output z-loss.

    Returns: (loss, nll_T, z-loss) as of that: means over all T tokens of their weighted terms, and the weighted cross
    entropy of each, which is 0 for a weight of 0.
    """
    one, zero = ops.constant_like(1.0, weight_T), ops.constant_like(0.0, weight_T)
    counts_T1 = ops.reshape(ops.where(weight_T > zero, one, zero), (-1, 1))
    loss, nll_T, z = ops.linear_cross_entropy_by_token(
        x_TD * ops.cast(counts_T1, ops.dtype(x_TD)), weight_VD, target_T, z_weight
    )
    kind, log_v = ops.dtype(loss), math.log(weight_VD.shape[0])
    weight_T = ops.cast(weight_T, kind)
    weight = ops.max(weight_T, axis=0)
    without = weight - ops.mean(weight_T)
    nats, squared = ops.constant_like(log_v, without), ops.constant_like(log_v * log_v, without)
    constant = without * (nats + squared * ops.constant_like(z_weight, without))
    return loss * weight - constant, nll_T * weight_T, z * weight - without * squared
