"""Auxiliary losses of routers. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing


def chosen_counts(ops: Ops, expert_N: Array, num_experts: int) -> Array:
    """Assignments per expert, (E,) of the index type; unrouted ones are not counted."""
    return ops.bincount(expert_N, num_experts + 1)[:num_experts]


def load_balance_loss(
    ops: Ops, routing: Routing, num_sequences: int, over_ranks: Callable[[Array], Array] | None = None
) -> Array:
    """E * sum_e f_e P_e, averaged over sequences (Switch Transformer, eq. 4 to 6).

    f_e is the share of the counted choices that went to expert e, before any drops; P_e is the mean normalised score.
    With num_sequences = 1 this is Switch's loss over the batch; with the number of sequences in the batch it is
    DeepSeek-V3's sequence-wise loss (eq. 17 to 20). With `over_ranks`, which averages an array over ranks, f is
    computed from the tokens of all ranks, so that the mean of the ranks' losses is the loss of all their tokens (Demons
    in the Detail, arXiv 2501.11873). The loss is 1 at perfect balance. The gradient flows through P only.
    Null experts take part, each with the mean of their shares, since null experts are interchangeable (AdaMoE, arXiv
    2406.13233, eq. 6, where f is K times ours).
    """
    experts, counted, nulls = routing.num_experts, routing.balanced_choices, routing.null_experts
    probs_TE = routing.probs_TE
    choice_TK = ops.reshape(routing.expert_N, (routing.num_tokens, -1))[:, :counted]
    chosen = ops.one_hot(choice_TK, experts + 1, ops.dtype(probs_TE))
    chosen_TE = ops.sum(chosen[..., :experts], axis=1) * ops.constant_like(1.0 / counted, probs_TE)
    if nulls:
        null_T1 = ops.sum(chosen[..., experts:], axis=1) * ops.constant_like(1.0 / (counted * nulls), probs_TE)
        chosen_TE = ops.concat([chosen_TE, *[null_T1] * nulls], axis=1)
    f_BE = ops.mean(ops.reshape(chosen_TE, (num_sequences, -1, experts + nulls)), axis=1)
    if over_ranks is not None:
        f_BE = over_ranks(f_BE)
    p_BE = ops.mean(ops.reshape(probs_TE, (num_sequences, -1, experts + nulls)), axis=1)
    balance = ops.mean(ops.sum(ops.stop_gradient(f_BE) * p_BE, axis=1))
    return ops.constant_like(float(experts + nulls), probs_TE) * balance


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
