"""Expert capacity: how many assignments an expert serves. `moeport.core.drop` decides which.

The policies `locmoe` and `locmoe_plus` measure the cosines between tokens and gate rows in the forward pass, average
them over steps on the host, and turn them into a capacity by `moeport.core.bounds`. Capacity and averages are untrained
parameters of the layer: they are in the checkpoint, and a compiled graph reads them as it reads weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeport.config.model import CapacityConfig
from moeport.core.array import Array
from moeport.core.bounds import controller_bound, delta_max_bound, lower_bound, rivals_bound
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.rounding import up_to_multiple
from moeport.core.routing import Routing

CAPACITY, AVERAGES = "capacity", "capacity_averages"
"""Names of a layer's untrained parameters: rows per expert (1,), 0 before the first estimate; and (3,): number of
averaged steps, delta, and the tokens that the rule counts, see `counted_tokens`."""
ROUNDING = 1e-5
"""A cosine less far than this below delta counts as delta: equal tokens differ by rounding, on every backend otherwise,
and have to be counted alike."""
MAX_ROWS = 2.0**24
"""Upper limit of an estimate: float32 is not exact for larger integers."""


@dataclass(frozen=True)
class Estimate:
    """What a capacity is estimated from."""

    delta: float
    """Cosine between a token and the gate row of its first choice."""
    kept: float
    """Number of an expert's own tokens in a micro-batch, those with it as first choice, whose cosine with its gate row
    is at least delta."""
    rivals: float
    """s q: number of the other tokens whose cosine with the gate row is at least delta."""


def factor_bound(config: CapacityConfig, num_tokens: int, choices_per_token: int, num_experts: int) -> int:
    """ceil(factor * T * K / E) (GShard, arXiv 2006.16668, section 2.2; Switch, arXiv 2101.03961, eq. 3, K = 1), rounded
    up to a multiple of `multiple_of`.
    """
    rows = math.ceil(config.factor * num_tokens * choices_per_token / num_experts)
    return up_to_multiple(rows, config.multiple_of)


def expert_capacity(
    ops: Ops, config: CapacityConfig, params: Mapping[str, Array], routing: Routing
) -> int | Array | None:
    """C, the most assignments an expert may serve; None: no limit.

    Policy `factor` gives the factor bound. `locmoe` and `locmoe_plus` give the estimate stored in the parameters,
    raised to `floor` and capped at the factor bound of this batch, or that bound before the first estimate; (1,) of
    the index type.

    Args:
        ops: the backend's operations.
        config: the `model.moe.capacity` section.
        params: the layer's parameters, by the names of `capacity_specs`.
        routing: what the router chose.
    """
    if not config.has_limit or routing.choices_per_token is None:
        return None
    most = factor_bound(config, routing.num_tokens, routing.choices_per_token, routing.num_experts)
    if not config.is_estimated:
        return most
    rows = params[CAPACITY]
    zero, least = ops.constant_like(0.0, rows), ops.constant_like(float(config.floor), rows)
    clipped = ops.where(rows > least, rows, least)
    wanted = ops.where(rows > zero, clipped, ops.constant_like(float(most), rows))
    # Counting the rows below the wanted number converts it to an index and caps it at `most`.
    row = ops.cast(ops.arange(most), ops.dtype(rows))
    return ops.bincount(ops.where(row < wanted, ops.index(0), ops.index(1)), 2)[:1]


def capacity_specs(config: CapacityConfig) -> list[ParameterSpec]:
    """The parameters that hold an estimated capacity; none for other policies."""
    if not config.is_estimated:
        return []
    return [
        ParameterSpec(CAPACITY, (1,), "zeros", trainable=False),
        ParameterSpec(AVERAGES, (3,), "zeros", trainable=False),
    ]


def affinity_statistics(ops: Ops, config: CapacityConfig, cosine_TE: Array, routing: Routing) -> Array:
    """What an estimate needs from one micro-batch, as sums over micro-batches and ranks.

    delta_e is the minimum, a quantile, the mean or the maximum of the cosines between expert e's gate row and its own
    tokens, those whose first choice is e. Of the own tokens, k_e have a cosine of at least delta_e; of the tokens with
    another first choice, or none, r_e have: the rivals, s q_e in the terms of LocMoE+, whose s tokens are irrelevant to
    the expert. Measuring q this way is ours: LocMoE+ proves how large a capacity must be for a given q, but does not
    say how to find q.

    Args:
        ops: the backend's operations.
        config: the `model.moe.capacity` section.
        cosine_TE: cosines between tokens and gate rows.
        routing: what the router chose, before drops.

    Returns: (4, E): n_e first choices; n_e delta_e; n_e k_e; n_e r_e. No gradient flows through it.
    """
    tokens, experts = routing.num_tokens, routing.num_experts
    cosine_TE = ops.stop_gradient(cosine_TE)
    kind = ops.dtype(cosine_TE)
    first_T = ops.reshape(ops.reshape(routing.expert_N, (tokens, -1))[:, :1], (-1,))
    own_TE = ops.one_hot(first_T, experts + 1, kind)[:, :experts]
    zero, one = ops.constant(0.0, kind), ops.constant(1.0, kind)
    half = ops.constant(0.5, kind)
    count_E = ops.sum(own_TE, axis=0)
    divisor_E = ops.where(count_E > half, count_E, one)
    match config.estimator:
        case "mean":
            delta_E = ops.sum(own_TE * cosine_TE, axis=0) / divisor_E
        case "maximum":
            delta_E = ops.max(ops.where(own_TE > half, cosine_TE, -one), axis=0)
        case "minimum":
            delta_E = -ops.max(ops.where(own_TE > half, -cosine_TE, -one), axis=0)
        case "quantile":
            own_cosine_T = ops.sum(own_TE * cosine_TE, axis=1)
            delta_E = _quantile(ops, config.delta_quantile, own_cosine_T, first_T, experts)
    least_1E = ops.reshape(delta_E, (1, -1)) - ops.constant(ROUNDING, kind)
    near_TE = ops.where(cosine_TE >= least_1E, one, zero)
    kept_E = ops.sum(near_TE * own_TE, axis=0)
    rivals_E = ops.sum(near_TE, axis=0) - kept_E
    means = (delta_E, kept_E, rivals_E)
    return ops.concat([ops.reshape(x_E, (1, -1)) for x_E in (count_E, *(count_E * mean_E for mean_E in means))], axis=0)


def _quantile(ops: Ops, quantile: float, cosine_T: Array, first_T: Array, experts: int) -> Array:
    """Per expert, entry floor(n * quantile), at most n - 1, of the sorted cosines of its n tokens."""
    by_cosine = ops.argsort(cosine_T)
    by_expert, _, counts = ops.sort_by_group(ops.take_rows(first_T, by_cosine), experts + 1)
    order = ops.take_rows(by_cosine, by_expert)
    start = ops.cumsum(counts, axis=0) - counts
    place = counts * ops.index(round(quantile * 1000)) // ops.index(1000)
    place = ops.where(place < counts, place, place - ops.index(1))
    place = ops.where(place < ops.index(0), ops.index(0), place)
    row = ops.where(start + place < ops.index(cosine_T.shape[0]), start + place, ops.index(cosine_T.shape[0] - 1))
    return ops.take_rows(cosine_T, ops.take_rows(order, row[:experts]))


def estimate_from(affinity_4E: np.ndarray) -> Estimate | None:
    """Means of the estimates of experts over the tokens that have a first choice; None if no token has one.

    Args:
        affinity_4E: sum of `affinity_statistics` over micro-batches and ranks.
    """
    count, *sums = (float(x) for x in affinity_4E.astype(np.float64).sum(1))
    return Estimate(*(x / count for x in sums)) if count else None


def counted_tokens(config: CapacityConfig, estimate: Estimate) -> float:
    """The tokens that the rule turns into a capacity: own ones and rivals for rule `rivals`, otherwise rivals."""
    counts_own = config.policy == "locmoe_plus" and config.rule == "rivals"
    return rivals_bound(estimate.kept if counts_own else 0.0, estimate.rivals)


def estimated_rows(config: CapacityConfig, delta: float, counted: float, dim: int, num_experts: int) -> float:
    """The capacity that an estimate calls for, before clipping; not rounded, possibly infinite.

    Args:
        config: the `model.moe.capacity` section, of policy `locmoe` or `locmoe_plus`.
        delta: the mean delta.
        counted: the mean of `counted_tokens`.
        dim: dimension of the space in which cosines are taken.
        num_experts: E.
    """
    if config.policy == "locmoe":
        failure = config.failure if config.target == "success" else None
        return lower_bound(delta, dim, num_experts, config.bound, config.probability, failure)
    match config.rule:
        case "rivals":
            return counted
        case "controller":
            return controller_bound(counted)
    return delta_max_bound(delta, dim, num_experts)


def updated_capacity(
    config: CapacityConfig, state: Mapping[str, np.ndarray], affinity_4E: np.ndarray, dim: int, num_experts: int
) -> dict[str, np.ndarray]:
    """New values of the parameters of `capacity_specs` after an optimiser step; empty if nothing changes.

    A pure function of numbers that are the same on all ranks, so that ranks never disagree.

    Args:
        config: the `model.moe.capacity` section.
        state: the current values by name.
        affinity_4E: sum of `affinity_statistics` over the micro-batches of the step and all ranks.
        dim: dimension of the space in which cosines are taken.
        num_experts: E.
    """
    steps, *means = (float(x) for x in state[AVERAGES])
    now = estimate_from(affinity_4E)
    if now is None or (config.freeze_after is not None and steps >= config.freeze_after):
        return {}
    decay = config.ema_decay if steps else 0.0
    steps += 1
    pairs = zip(means, (now.delta, counted_tokens(config, now)), strict=True)
    averages = np.array([steps, *(decay * mean + (1 - decay) * x for mean, x in pairs)], np.float32)
    if steps > 1 and steps % config.update_interval:
        return {AVERAGES: averages}
    rows = estimated_rows(config, float(averages[1]), float(averages[2]), dim, num_experts)
    return {AVERAGES: averages, CAPACITY: np.array([math.ceil(min(max(rows, 1.0), MAX_ROWS))], np.float32)}
