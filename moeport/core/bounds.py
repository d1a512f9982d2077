"""LocMoE's lower bounds of expert capacity, as functions of numbers (arXiv 2401.13920; LocMoE+, arXiv 2406.00023).

The setting of the theorem: tokens are uniform on the unit sphere in d dimensions, the gate rows of the n experts are
orthogonal and of equal length, and a token is *discriminative* for an expert if the cosine between it and the expert's
gate row is at least delta. The capacity must be large enough for a discriminative token to reach the expert.

The published bound grows with delta. For the delta of a trained model it may exceed any number of tokens, or be below
one, so the capacity policies clip it.
"""

from __future__ import annotations

import math

FORMS = ("incomplete_beta", "erfc", "exponential")
EXCLUSIVE = math.sqrt(0.5)
"""Cosine beyond which a token cannot be near two orthogonal gate rows: their squares would add up to more than 1."""
_TINY = 1e-300
_CLOSE = 1e-15


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    Args:
        a: above 0.
        b: above 0.
        x: from 0 to 1.
    """
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast on the other side only
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_factor = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # 1 / (1 + d_1 / (1 + d_2 / (1 + ...))) from the front, as the product of ratios of neighbouring denominators.
    fraction = numerators = 1.0
    denominators = 0.0
    for term in range(100_000):
        m = term // 2
        if term == 0:
            d = 1.0
        elif term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominators = 1.0 / _away_from_zero(1.0 + d * denominators)
        numerators = _away_from_zero(1.0 + d / numerators)
        fraction *= numerators * denominators
        if abs(numerators * denominators - 1.0) < _CLOSE:
            break
    return math.exp(log_factor) / a * (fraction - 1.0)


def _away_from_zero(x: float) -> float:
    return x if abs(x) > _TINY else _TINY


def two_sided_probability(delta: float, dim: int, form: str) -> float:
    """p_delta: the probability that a uniform token has an absolute cosine of at least delta with a given direction.

    `incomplete_beta`: 1 - I_{delta^2}(1/2, (d-1)/2), exact (LocMoE, lemma 3). `erfc`: erfc(sqrt(delta^2 d /
    (2 - delta^2))), for large d. `exponential`: exp(-delta^2 d / (2 - delta^2)), an upper bound of the second, which
    bounds the capacity from below (theorem 1).

    Args:
        delta: a cosine; below 0 counts as 0.
        dim: d.
        form: one of FORMS.
    """
    square = min(max(delta, 0.0), 1.0) ** 2
    if dim == 1:  # all tokens lie on one line
        return 1.0
    exponent = square * dim / (2.0 - square)
    if form == "incomplete_beta":
        return incomplete_beta((dim - 1) / 2, 0.5, 1.0 - square)
    return math.erfc(math.sqrt(exponent)) if form == "erfc" else math.exp(-exponent)


def arrival_probability(delta: float, dim: int, experts: int, form: str, probability: str) -> float:
    """p_i: the probability that a token routed to an expert is discriminative for it.

    `paper`: n p_delta (LocMoE, theorem 1), which may exceed 1. It counts a token on both sides of an expert, and once
    for each expert. `independent`, ours: the probability that the largest of the n cosines is at least delta. Beyond
    sqrt(1/2) no two of them are, so it is n p_delta / 2. Below, they are taken to be independent, which gives
    1 - (1 - p_delta / 2)^n; the cosines of one token are not quite, as their squares sum to at most 1. It is then too
    small, by at most a few percent in hundreds of dimensions; the tests say how much.

    Args:
        delta: a cosine; below 0 counts as 0.
        dim: d.
        experts: n.
        form: one of FORMS.
        probability: paper or independent.
    """
    two_sided = two_sided_probability(delta, dim, form)
    if probability == "paper":
        return experts * two_sided
    if delta > EXCLUSIVE:
        return min(1.0, experts * two_sided / 2)
    return -math.expm1(experts * math.log1p(-two_sided / 2))


def lower_bound(
    delta: float,
    dim: int,
    experts: int,
    form: str = "incomplete_beta",
    probability: str = "paper",
    failure: float | None = None,
) -> float:
    """The number of tokens an expert must take for a discriminative one to be among them (LocMoE, theorem 1).

    Args:
        delta: the least cosine of a discriminative token and its expert's gate row; below 0 counts as 0.
        dim: dimensions d of tokens and gate rows.
        experts: n.
        form: how p_delta is computed, see `two_sided_probability`.
        probability: how p_i follows from it, see `arrival_probability`.
        failure: None: one discriminative token is expected, 1 / p_i, as in the paper. Else none arrives with this
            probability: the C of (1 - p_i)^C = failure, at least 1. Ours.

    Returns: tokens, not rounded and not clipped; infinite where p_i is too small for a float.
    """
    arrival = arrival_probability(delta, dim, experts, form, probability)
    if arrival == 0.0:
        return math.inf
    if failure is None:
        return 1.0 / arrival
    return max(1.0, math.log(failure) / math.log1p(-arrival)) if arrival < 1.0 else 1.0


def delta_max_bound(delta: float, dim: int, experts: int) -> float:
    """exp(d delta^2 / (2 - delta^2)) / n, with delta the largest cosine (LocMoE+, remark 7); infinite on overflow."""
    return lower_bound(delta, dim, experts, "exponential")


def controller_bound(rivals: float) -> float:
    """2 s q: with this capacity, an expert that takes its best tokens takes the discriminative one almost surely.

    LocMoE+ proves a probability of 1 - exp(-3 C / 16) for C >= 2 s q, where s is the number of irrelevant tokens and q
    the probability that one of them scores at least as high as the discriminative one.

    Args:
        rivals: s q, tokens.
    """
    return 2.0 * rivals


def rivals_bound(kept: float, rivals: float) -> float:
    """The capacity at which an expert that takes its best tokens takes all that it is to keep. Ours.

    Args:
        kept: its own tokens that it is to keep: those that score at least delta.
        rivals: other experts' tokens that score at least delta.
    """
    return kept + rivals
