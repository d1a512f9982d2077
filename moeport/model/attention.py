"""Attention with rotary positions: grouped-query attention, or the latent one of `moeport.model.latent_attention`."""

from __future__ import annotations

from collections.abc import Mapping

from moeport.config.model import ModelConfig
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.model.forward_pass import Pass
from moeport.model.latent_attention import latent_attention_forward, latent_specs
from moeport.model.projection import project

BIASED = {"none": (), "qkv": ("q", "k", "v"), "all": ("q", "k", "v", "out")}
"""The projections of grouped-query attention that add a bias, by the value of `model.attention.bias`."""


def attention_specs(config: ModelConfig, out_std: float) -> list[ParameterSpec]:
    """Weights of one attention block: q (H A, D), k and v (G A, D), out (D, H A), their biases, and the norms of
    queries and keys: of each head (A,), or of all of them (H A,) and (G A,). Of a latent one, those of `latent_specs`.
    """
    if config.attention.kind == "mla":
        return latent_specs(config, out_std)
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    specs = [
        ParameterSpec("q", (width, config.d_model), std=config.init_std, matrices=1, in_compute_type=True),
        ParameterSpec("k", (kv_width, config.d_model), std=config.init_std, matrices=1, in_compute_type=True),
        ParameterSpec("v", (kv_width, config.d_model), std=config.init_std, matrices=1, in_compute_type=True),
        ParameterSpec("out", (config.d_model, width), std=out_std, matrices=1, in_compute_type=True),
    ]
    specs += [
        ParameterSpec(f"{spec.name}_bias", spec.shape[:1], "zeros", in_compute_type=True)
        for spec in specs
        if spec.name in BIASED[config.attention.bias]
    ]
    if config.attention.qk_norm:
        whole = config.attention.qk_norm == "whole"
        specs += [
            ParameterSpec("q_norm", (width if whole else config.head_dim,), "ones"),
            ParameterSpec("k_norm", (kv_width if whole else config.head_dim,), "ones"),
        ]
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
    if config.attention.kind == "mla":
        return latent_attention_forward(run, config, params, x_BSD, causal)
    ops, (batch, sequence, _) = run.ops, x_BSD.shape
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (project(ops, params, name, x_BSD) for name in ("q", "k", "v"))
    qk_norm = config.attention.qk_norm
    if qk_norm == "whole":
        q, k = _normed(ops, config, params, q, k)
    q = ops.reshape(q, (batch, sequence, heads, width))
    k = ops.reshape(k, (batch, sequence, kv_heads, width))
    v = ops.reshape(v, (batch, sequence, kv_heads, width))
    if qk_norm is True:
        q, k = _normed(ops, config, params, q, k)
    out = run.attend(run.rotated(q), run.rotated(k), v, causal)
    return project(ops, params, "out", ops.reshape(out, (batch, sequence, heads * width)))


def _normed(ops: Ops, config: ModelConfig, params: Mapping[str, Array], q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and keys, RMS-normalised over their last dimension."""
    eps = config.norm_eps
    return ops.rms_norm(q, params["q_norm"], eps), ops.rms_norm(k, params["k_norm"], eps)
