"""Rotary positions: the frequencies, plain or scaled for longer texts, and their tables."""

from __future__ import annotations

import math

import numpy as np

from moeport.config.model import ModelConfig, RopeScalingConfig
from moeport.model.rope_bases import bases_of


def rope_tables(
    sequence_length: int, head_dim: int, base: float, scaling: RopeScalingConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the rotary angles, each (S, A) float64, the second half equal to the first.

    Angle of position m and pair i is m * base^(-2i / A) (Su et al. 2021, eq. 15). YaRN also multiplies both tables.
    """
    scaling = scaling or RopeScalingConfig()
    frequency = _frequencies(head_dim, base, scaling)
    angles = np.outer(np.arange(sequence_length), np.concatenate([frequency, frequency]))
    factor = attention_factor(scaling)
    return np.cos(angles) * factor, np.sin(angles) * factor


def attention_factor(scaling: RopeScalingConfig) -> float:
    """What the tables are multiplied by: 0.1 ln(factor) + 1 with YaRN (arXiv 2309.00071, eq. 22), or what DeepSeek-V2
    makes of `mscale` and `mscale_all_dim`; otherwise 1.
    """
    if scaling.type != "yarn":
        return 1.0
    default = _magnitude(scaling.factor, 1.0)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        default = _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return scaling.attention_factor or default


def score_factor(scaling: RopeScalingConfig) -> float:
    """What the scores of latent attention are multiplied by besides 1 / sqrt(A), as in DeepSeek-V2."""
    if scaling.type != "yarn" or scaling.mscale_all_dim is None:
        return 1.0
    return _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _frequencies(head_dim: int, base: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Angle per position of each pair, (A / 2,)."""
    plain = base ** (-np.arange(0, head_dim, 2) / head_dim)
    match scaling.type:
        case "linear":
            return plain / scaling.factor
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, head_dim, base, scaling)
    return plain


def _llama3(plain: np.ndarray, scaling: RopeScalingConfig) -> np.ndarray:
    """Long waves divided by the factor, short ones kept, and those between interpolated (Llama 3.1)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_positions * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return plain / scaling.factor * (1 - share) + plain * share


def _yarn(plain: np.ndarray, head_dim: int, base: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Interpolated by a ramp over the pairs (YaRN, arXiv 2309.00071, eq. 20), whose ends are rounded outwards."""

    def pair(turns: float) -> float:
        positions = scaling.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(positions) / (2 * math.log(base))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def of_config(config: ModelConfig, sequence_length: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the rotary angles of a config.

    Args:
        config: the `model` section.
        sequence_length: S.
        dtype: type of the tables.

    Returns: each (S, A); with different bases (S, G A), the tables of the key-value heads beside each other.
    """
    attention = config.attention
    bases = bases_of(config)
    if len(set(bases)) == 1:
        bases = bases[:1]
    tables = [
        [table.astype(dtype) for table in rope_tables(sequence_length, config.rope_dim, base, attention.rope_scaling)]
        for base in bases
    ]
    cos, sin = (np.concatenate(kind, axis=1) for kind in zip(*tables, strict=True))
    return cos, sin
