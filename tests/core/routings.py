"""Routings made by hand."""

import numpy as np

from moeport.core.routing import Routing
from tests.support import rng


def routing_of(ops, experts_TK, gates_TK, num_experts, dtype="float64", probs_TE=None):
    """A routing with these decisions; a choice of `num_experts` is unrouted."""
    experts_TK, gates_TK = np.asarray(experts_TK), np.asarray(gates_TK, np.float64)
    tokens, choices = experts_TK.shape
    scores = np.zeros((tokens, num_experts)) if probs_TE is None else probs_TE
    scores = ops.cast(ops.from_numpy(scores), dtype)
    return Routing(
        expert_N=ops.from_numpy(experts_TK.reshape(-1)),
        weight_N=ops.cast(ops.from_numpy(gates_TK.reshape(-1)), dtype),
        num_tokens=tokens,
        num_experts=num_experts,
        logits_TE=scores,
        probs_TE=scores,
        balanced_choices=choices,
    )


def random_decisions(seed, tokens, choices, num_experts, unrouted=False):
    """Different experts for each token, skewed to the first ones, and gates that are multiples of 1/16, many equal.

    With `unrouted`, some second choices are not served by the router.
    """
    random = rng(seed)
    popularity = 1.0 / np.arange(1, num_experts + 1)
    experts = np.array(
        [random.choice(num_experts, choices, replace=False, p=popularity / popularity.sum()) for _ in range(tokens)]
    )
    gates = random.integers(1, 5, (tokens, choices)) / 16
    if unrouted:
        gone = random.random(tokens) < 0.3
        experts[gone, -1], gates[gone, -1] = num_experts, 0.0
    return experts, gates
