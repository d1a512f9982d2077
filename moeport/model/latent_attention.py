"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

Each head's keys and values are projections of one latent vector per token, which is RMS-normalised, and queries may be
projections of another. Queries and keys have an unrotated part and a rotated one; all heads share the rotated part of
the key. The pairs (i, i + A/2) of the rotated part are rotated, as everywhere in moeport. DeepSeek's weights have those
pairs in neighbouring rows, which a conversion puts in our order; scores do not depend on it.

H heads, A width of queries and keys, W width of values; other suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeport.config.model import ModelConfig
from moeport.core.array import Array
from moeport.core.parameters import ParameterSpec
from moeport.model import rope
from moeport.model.forward_pass import Pass
from moeport.model.projection import project

BIASED = {"none": (), "all": ("q_down", "kv_down", "out")}
"""The projections that add a bias, by the value of `model.attention.bias`."""


def latent_specs(config: ModelConfig, out_std: float) -> list[ParameterSpec]:
    """Weights of one attention block.

    Queries: q (H A, D), or q_down (R, D), its norm q_norm (R,) and q_up (H A, R). Keys and values: kv_down, whose rows
    are the latent vector's and then the rotated part's; kv_norm; and kv_up, whose rows are, for each head, those of the
    key's unrotated part and then those of the value. Output: out (D, H W). Biases as `BIASED` says.
    """
    attention, width, heads = config.attention, config.d_model, config.num_heads
    rank, kv_rank = attention.q_lora_rank, attention.kv_lora_rank
    up = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    queries = {"q": (heads * config.head_dim, width)}
    if rank is not None:
        queries = {"q_down": (rank, width), "q_up": (heads * config.head_dim, rank)}
    shapes = {
        **queries,
        "kv_down": (kv_rank + attention.qk_rope_head_dim, width),
        "kv_up": (up, kv_rank),
        "out": (width, heads * attention.v_head_dim),
    }
    specs = [
        ParameterSpec(name, shape, std=out_std if name == "out" else config.init_std, matrices=1, in_compute_type=True)
        for name, shape in shapes.items()
    ]
    specs += [
        ParameterSpec(f"{name}_bias", shapes[name][:1], "zeros", in_compute_type=True)
        for name in BIASED[attention.bias]
        if name in shapes
    ]
    specs += [ParameterSpec("q_norm", (rank,), "ones")] if rank is not None else []
    return [*specs, ParameterSpec("kv_norm", (kv_rank,), "ones")]


def latent_attention_forward(
    run: Pass, config: ModelConfig, params: Mapping[str, Array], x_BSD: Array, causal: bool = True
) -> Array:
    """Attention. Arguments and result as of `moeport.model.attention.attention_forward`."""
    ops, attention, (batch, sequence, _) = run.ops, config.attention, x_BSD.shape
    heads, plain, rotated = config.num_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim
    q = ops.reshape(_queries(run, config, params, x_BSD), (batch, sequence, heads, config.head_dim))
    q_plain, q_rotated = ops.split(q, (plain, rotated), axis=3)
    latent, k_rotated = ops.split(project(ops, params, "kv_down", x_BSD), (attention.kv_lora_rank, rotated), axis=2)
    latent = ops.rms_norm(latent, params["kv_norm"], attention.latent_norm_eps)
    up = ops.reshape(project(ops, params, "kv_up", latent), (batch, sequence, heads, -1))
    k_plain, v_BSHW = ops.split(up, (plain, attention.v_head_dim), axis=3)
    k_rotated = run.rotated(ops.reshape(k_rotated, (batch, sequence, 1, rotated)))
    k_rotated = k_rotated + ops.zeros((1, 1, heads, 1), ops.dtype(k_rotated))  # one for all heads
    q_BSHA = ops.concat([q_plain, run.rotated(q_rotated)], axis=3)
    k_BSHA = ops.concat([k_plain, k_rotated], axis=3)
    out = run.attend(q_BSHA, k_BSHA, v_BSHW, causal, score_scale(config))
    return project(ops, params, "out", ops.reshape(out, (batch, sequence, heads * attention.v_head_dim)))


def score_scale(config: ModelConfig) -> float:
    """What the scores are multiplied by: 1 / sqrt(A), and with YaRN what `mscale_all_dim` says."""
    return float(config.head_dim**-0.5 * rope.score_factor(config.attention.rope_scaling))


def _queries(run: Pass, config: ModelConfig, params: Mapping[str, Array], x_BSD: Array) -> Array:
    """(B, S, H A)."""
    ops, attention = run.ops, config.attention
    if attention.q_lora_rank is None:
        return project(ops, params, "q", x_BSD)
    latent = ops.rms_norm(project(ops, params, "q_down", x_BSD), params["q_norm"], attention.latent_norm_eps)
    return project(ops, params, "q_up", latent)
