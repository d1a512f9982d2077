"""Rows of an exchange on their way to the experts: expected ones in closed form, or those of given choices.

Shape suffixes: W ranks, P assignments of tokens to experts, T tokens of a rank, K choices of a token.
"""

from __future__ import annotations

from functools import cache
from math import comb
from pathlib import Path

import numpy as np

from moeport.comm.load import Demand, Layout, Moved, Routes
from moeport.plan.traffic import expert_choices, local_fraction, read_choices

DRAWN = 2**23
"""Random numbers that stand for the traffic of a whole cluster."""


def routes(kind: str, layout: Layout, demand: Demand) -> Routes:
    """Rows of an exchange: expected ones in closed form for `uniform` and `local:F`, else those of choices.

    Args:
        kind: see `expert_choices`. Of `zipf` choices are drawn; a file is divided among the ranks in order.
        layout: ranks and nodes.
        demand: tokens and experts.

    Raises UserError as `expert_choices` does.
    """
    if kind == "uniform":
        return expected_routes(layout, demand)
    if kind.startswith("local:"):
        return expected_routes(layout, demand, local_fraction(kind))
    ranks, experts, top_k = layout.ranks, demand.num_experts, demand.top_k
    if kind.endswith(".npy"):
        return counted_routes(layout, demand, read_choices(Path(kind), experts, top_k, ranks))
    expert_TK = _drawn(kind, experts, top_k)
    return counted_routes(layout, demand, np.resize(expert_TK, (max(ranks, len(expert_TK)), top_k)))


@cache
def _drawn(kind: str, num_experts: int, top_k: int) -> np.ndarray:
    return expert_choices(kind, DRAWN // num_experts, num_experts, top_k, rank=0, size=1, node=0, nodes=1)


def expected_routes(layout: Layout, demand: Demand, locality: float | None = None) -> Routes:
    """Expected rows, in closed form.

    With c = E / n experts on each of n nodes, j choices of a token are on its own node with probability P(j), and
    choices on either side are uniform without replacement. So a token misses a set of s of the E - c other experts with
    probability sum_j P(j) C(E - c - s, K - j) / C(E - c, K - j), and a set on its own node likewise. Another node is
    s = c, a rank s = E / W. For uniform choices P is hypergeometric and both are C(E - s, K) / C(E, K).

    Args:
        layout: ranks and nodes.
        demand: tokens and experts.
        locality: probability that a choice is on the token's own node, as far as the node has experts left: P is
            binomial and what exceeds either side moves to the other. None: all sets of K experts alike.
    """
    tokens, top_k, experts, per_node = demand.tokens, demand.top_k, demand.num_experts, layout.ranks_per_node
    near = experts // layout.nodes
    far = experts - near
    choices = range(top_k + 1)
    if locality is None:
        share = {j: comb(near, j) * comb(far, top_k - j) / comb(experts, top_k) for j in choices}
    else:
        share = dict.fromkeys(choices, 0.0)
        for j in choices:
            share[max(min(j, near), top_k - far)] += comb(top_k, j) * locality**j * (1 - locality) ** (top_k - j)
    nearby = sum(j * p for j, p in share.items())

    def reaches(size: int, is_own: bool) -> float:
        """Probability that a token has one of `size` experts, all on its own node or all on another one."""
        side = near if is_own else far
        drawn = ((j if is_own else top_k - j, p) for j, p in share.items() if p)
        return sum(p * (1 - comb(max(side - size, 0), chosen) / comb(side, chosen)) for chosen, p in drawn)

    others, local = layout.nodes - 1, experts // layout.ranks
    a_rank = reaches(local, True) + others * reaches(local, False)

    def even(kept: float, intra: float, inter: float) -> Moved:
        kept_W, intra_W, inter_W = (np.full(layout.ranks, tokens * rows) for rows in (kept, intra, inter))
        return Moved(kept_W, intra_W, inter_W, intra_W, inter_W)

    return Routes(
        flat=even(nearby / per_node, nearby * (1 - 1 / per_node), top_k - nearby),
        rail=even(nearby, 0.0, top_k - nearby),
        inside=even(top_k / per_node, top_k * (1 - 1 / per_node), 0.0),
        tokens=even(reaches(near, True), 0.0, others * reaches(near, False)),
        inside_tokens=even(a_rank, (per_node - 1) * a_rank, 0.0),
    )


def counted_routes(layout: Layout, demand: Demand, expert_TK: np.ndarray) -> Routes:
    """Rows of given choices, which are divided among the ranks in order and stand for the tokens of the demand.

    Args:
        layout: ranks and nodes.
        demand: tokens and experts.
        expert_TK: experts of at least one token per rank, (T, K).
    """
    ranks, per_node, nodes = layout.ranks, layout.ranks_per_node, layout.nodes
    tokens, top_k = expert_TK.shape
    parts = [len(part) for part in np.array_split(np.arange(tokens), ranks)]
    source_P = np.repeat(np.arange(ranks), np.array(parts) * top_k)
    target_P = expert_TK.reshape(-1) // (demand.num_experts // ranks)
    relay_P = target_P // per_node * per_node + source_P % per_node
    token_P = np.arange(tokens).repeat(top_k)
    _, at_node = np.unique(token_P * nodes + target_P // per_node, return_index=True)
    _, at_rank = np.unique(token_P * ranks + target_P, return_index=True)
    scale = demand.tokens * ranks / tokens

    def moved(source_R: np.ndarray, target_R: np.ndarray) -> Moved:
        kept, intra = source_R == target_R, source_R // per_node == target_R // per_node
        rows = (
            np.bincount(rank_R[chosen], minlength=ranks)
            for rank_R, chosen in (
                (source_R, kept),
                (source_R, intra & ~kept),
                (source_R, ~intra),
                (target_R, intra & ~kept),
                (target_R, ~intra),
            )
        )
        return Moved(*rows).times(scale)

    return Routes(
        flat=moved(source_P, target_P),
        rail=moved(source_P, relay_P),
        inside=moved(relay_P, target_P),
        tokens=moved(source_P[at_node], relay_P[at_node]),
        inside_tokens=moved(relay_P[at_rank], target_P[at_rank]),
    )
