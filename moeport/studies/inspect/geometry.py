"""How tokens lie to each other and to the gate rows: how well routing separates them.

Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.studies.inspect.walk import Layer, Routed


@dataclass(frozen=True)
class Geometry:
    """Of one layer on one text."""

    separation: float
    """CH (LocMoE+, arXiv 2406.00023), of tokens grouped by their first expert; NaN with fewer than two groups."""
    own_angle: float
    """Mean angle of a token and the gate row of its first expert, in degrees; NaN without gate rows."""
    other_angle: float
    """Mean angle of a token and the gate rows of all other experts, likewise."""
    mean_cosine: float
    """Mean cosine of a token and the gate row of its first expert; NaN without gate rows."""
    largest_cosine: float
    """The largest of them."""


def geometry(layer: Layer) -> Geometry:
    """Measure one layer, portion by portion."""
    return Geometry(separation(layer), *_angles(layer.routed))


def separation(layer: Layer) -> float:
    """CH = sum_i n_i |c_i - c|^2 / sum_i sum_(x in C_i) |x - c_i|^2 (LocMoE+, arXiv 2406.00023).

    C_i are the tokens whose first expert is i, as the layer reads them; c_i and c are centres. Unlike the index of
    Calinski and Harabasz it has no factor (n - k) / (k - 1), as the paper prints it. Tokens without an expert are left
    out.
    """
    experts, dim = layer.num_experts, layer.moe.d_model
    count_E, sum_ED, squares = np.zeros(experts), np.zeros((experts, dim)), 0.0
    middle_D = np.mean([routed.x_TD.mean(0, dtype=np.float64) for routed in layer.routed], axis=0)
    for routed in layer.routed:
        token_N, expert_N = first_choices(routed, experts)
        x_ND = routed.x_TD[token_N].astype(np.float64) - middle_D  # near the centre, so that squares do not cancel
        np.add.at(count_E, expert_N, 1)
        np.add.at(sum_ED, expert_N, x_ND)
        squares += float((x_ND**2).sum())
    groups = count_E > 0
    if groups.sum() < 2:
        return float("nan")
    within_groups = float(((sum_ED[groups] ** 2).sum(1) / count_E[groups]).sum())
    overall = float((sum_ED.sum(0) ** 2).sum() / count_E.sum())
    between, within = within_groups - overall, squares - within_groups
    return between / within if within > 0 else float("inf")


def first_choices(routed: Routed, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with an expert, and the first expert of each; where experts choose, that of highest score among them."""
    made_N = routed.expert_N < experts
    token_N, expert_N = routed.token_N[made_N], routed.expert_N[made_N]
    if (np.diff(token_N) < 0).any():
        order = np.lexsort((expert_N, -routed.probs_TE[token_N, expert_N], token_N))
        token_N, expert_N = token_N[order], expert_N[order]
    first = np.r_[True, np.diff(token_N) > 0] if len(token_N) else np.zeros(0, bool)
    return token_N[first], expert_N[first]


def _angles(routed: Sequence[Routed]) -> tuple[float, float, float, float]:
    """The fields of `Geometry` that are of angles and cosines, in their order."""
    angle = others = cosine = tokens = pairs = 0.0
    largest = -1.0
    for each in routed:
        if each.cosine_TE is None:
            break
        token_N, expert_N = first_choices(each, each.cosine_TE.shape[1])
        cosine_NE = np.clip(each.cosine_TE[token_N].astype(np.float64), -1, 1)
        own_N, angle_NE = cosine_NE[np.arange(len(token_N)), expert_N], np.degrees(np.arccos(cosine_NE))
        own_angle_N = angle_NE[np.arange(len(token_N)), expert_N]
        angle += float(own_angle_N.sum())
        others += float(angle_NE.sum() - own_angle_N.sum())
        cosine += float(own_N.sum())
        largest = max(largest, float(own_N.max(initial=-1.0)))
        tokens += len(token_N)
        pairs += angle_NE.size - len(token_N)
    if not tokens:
        return (float("nan"),) * 4
    return angle / tokens, (others / pairs if pairs else float("nan")), cosine / tokens, largest
