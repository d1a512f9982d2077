"""Grouped-query attention with rotary positions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeport.config.model import ModelConfig
from moeport.core.array import Array
from moeport.core.parameters import ParameterSpec
from moeport.model.forward_pass import Pass


def rope_tables(sequence_length: int, head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the rotary angles, each (S, A) float64, the second half equal to the first.

    Angle of position m and pair i is m * base^(-2i / A) (Su et al. 2021, eq. 15).
    """
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(sequence_length), np.concatenate([frequency, frequency]))
    return np.cos(angles), np.sin(angles)


def attention_specs(config: ModelConfig, out_std: float) -> list[ParameterSpec]:
    """Weights of one attention block: q (H A, D), k and v (G A, D), out (D, H A), and the norms of queries and keys."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    specs = [
        ParameterSpec("q", (width, config.d_model), std=config.init_std),
        ParameterSpec("k", (kv_width, config.d_model), std=config.init_std),
        ParameterSpec("v", (kv_width, config.d_model), std=config.init_std),
        ParameterSpec("out", (config.d_model, width), std=out_std),
    ]
    if config.attention.qk_norm:
        specs += [ParameterSpec(name, (config.head_dim,), "ones") for name in ("q_norm", "k_norm")]
    return specs


def attention_forward(
    run: Pass,
    config: ModelConfig,
    params: Mapping[str, Array],
    x_BSD: Array,
    causal: bool = True,
) -> Array:
    """Attention.

    Args:
        run: how the pass is computed.
        config: the `model` section.
        params: arrays by the names of `attention_specs`.
        x_BSD: (B, S, D).
        causal: whether a position sees only itself and earlier ones.

    Returns: (B, S, D).
    """
    ops, (batch, sequence, _) = run.ops, x_BSD.shape
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    q = ops.reshape(ops.linear(x_BSD, params["q"]), (batch, sequence, heads, width))
    k = ops.reshape(ops.linear(x_BSD, params["k"]), (batch, sequence, kv_heads, width))
    v = ops.reshape(ops.linear(x_BSD, params["v"]), (batch, sequence, kv_heads, width))
    if config.attention.qk_norm:
        q = ops.rms_norm(q, params["q_norm"], config.norm_eps)
        k = ops.rms_norm(k, params["k_norm"], config.norm_eps)
    out = ops.attention(ops.rope(q, *run.rope), ops.rope(k, *run.rope), v, causal)
    return ops.linear(ops.reshape(out, (batch, sequence, heads * width)), params["out"])
