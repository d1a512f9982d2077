"""Bases of the rotary angles by head (HARPE, arXiv 2412.07171): evenly spaced, or searched for."""

from __future__ import annotations

from functools import cache

import numpy as np

from moeport.config.model import ModelConfig, RopeBasesConfig, candidates

_BLOCK = 256


def bases_of(config: ModelConfig) -> tuple[float, ...]:
    """The base of each key-value head (G,)."""
    given, groups = config.attention.rope_bases, config.num_kv_heads
    match given.kind:
        case "list":
            return given.values
        case "uniform":
            found = uniform(given.low, given.high, groups)
        case "peak_valley":
            found = peak_valley(given, config.rope_dim, groups)
        case _:
            return (config.attention.rope_base,) * groups
    return found if given.order == "ascending" else found[::-1]


def uniform(low: float, high: float, count: int) -> tuple[float, ...]:
    """low + h (high - low) / (count - 1) for h from 0; a single one is low."""
    return tuple(np.linspace(low, high, count).tolist())


def wave(base: float, width: int, first: int, positions: int) -> np.ndarray:
    """The product of a query and a key of equal entries over their distance, up to a factor.

    w(m) = 2 / sqrt(A) * sum over pairs i of cos(m base^(-2i / A)), as in the code of attention buckets, which the
    search of HARPE comes from.

    Args:
        base: of the angles.
        width: A.
        first: the first distance m.
        positions: how many distances follow from there.

    Returns: (positions,) float64.
    """
    frequency_P = base ** (-np.arange(0, width, 2) / width)
    starts = np.outer(np.arange(first, first + positions, _BLOCK), frequency_P)
    steps = np.outer(np.arange(_BLOCK), frequency_P)
    # cos(x + y) = cos x cos y - sin x sin y: two products of matrices in place of a cosine per distance and pair.
    waves = np.cos(starts) @ np.cos(steps).T - np.sin(starts) @ np.sin(steps).T
    return np.asarray(waves.reshape(-1)[:positions] * (2 / np.sqrt(width)))


def extrema(wave_M: np.ndarray, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the peaks and the valleys are: values above, or below, all others within `spacing` of them.

    The first and the last `spacing` values are none.
    """
    middle = wave_M[spacing : len(wave_M) - spacing]
    is_peak, is_valley = np.ones_like(middle, bool), np.ones_like(middle, bool)
    for away in range(1, spacing + 1):
        for start in (spacing - away, spacing + away):
            other = wave_M[start : start + len(middle)]
            is_peak &= middle > other
            is_valley &= middle < other
    return np.flatnonzero(is_peak) + spacing, np.flatnonzero(is_valley) + spacing


def peak_valley(given: RopeBasesConfig, width: int, count: int) -> tuple[float, ...]:
    """Bases whose waves are high where those of others are low, ascending.

    From `low` on, that base is added whose peaks are nearest to the valleys of those chosen before, and its valleys to
    their peaks: d = sum_i |p_i - v_i| + sum_i |v_i - p_i|. The lower of two bases is chosen where d is equal.

    Args:
        given: `model.attention.rope_bases`.
        width: A of the heads.
        count: how many bases.
    """
    return _searched(given.model_copy(update={"order": "ascending"}), width, count)


@cache
def _searched(given: RopeBasesConfig, width: int, count: int) -> tuple[float, ...]:
    bases = [given.low + i * given.step for i in range(candidates(given.low, given.high, given.step))]
    distance = _to_nearest if given.pairing == "nearest" else _in_order
    found = [extrema(wave(base, width, given.first_position, given.positions), given.spacing) for base in bases]
    chosen, (peaks, valleys) = [0], found[0]
    while len(chosen) < count:
        rest = [i for i in range(len(bases)) if i not in chosen]
        best = min(rest, key=lambda i: distance(found[i][0], valleys) + distance(found[i][1], peaks))
        chosen.append(best)
        peaks, valleys = np.union1d(peaks, found[best][0]), np.union1d(valleys, found[best][1])
    return tuple(bases[i] for i in sorted(chosen))


def _to_nearest(x_P: np.ndarray, y_P: np.ndarray) -> float:
    """Sum over x of the distance to the nearest y."""
    if not len(y_P):
        return 0.0
    after = np.searchsorted(y_P, x_P)
    return float(np.minimum(*(np.abs(x_P - y_P[i.clip(0, len(y_P) - 1)]) for i in (after - 1, after))).sum())


def _in_order(x_P: np.ndarray, y_P: np.ndarray) -> float:
    """Sum over i of the distance of the i-th of both, as far as both go."""
    shorter = min(len(x_P), len(y_P))
    return float(np.abs(x_P[:shorter] - y_P[:shorter]).sum())
