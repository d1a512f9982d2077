"""Which elements of their tensors are which elements of our parameters, by family and layout.

A `Part` is a run of consecutive elements on both sides: an expert's gate projection is a tensor of its own in one
layout, a stretch of a fused tensor in another, and always a stretch of our `experts.w_in`. Reading and writing use the
same parts, which cover each tensor and each parameter exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moeport.config.model import ModelConfig
from moeport.convert.family import Family
from moeport.convert.rows import Pairs
from moeport.model.attention import BIASED
from moeport.model.latent_attention import latent_specs

Layout = Literal["experts", "fused"]
"""A tensor per expert and projection, or two per layer that hold all experts, as transformers 5 has them in memory."""

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
"""Their name of each projection of attention."""
LATENT = {
    "q": "q_proj",
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}
"""Their names of the parameters of latent attention."""


CHOICE_BIAS = "e_score_correction_bias"
"""Their name of the bias of router `sigmoid_bias`."""


@dataclass(frozen=True)
class Part:
    """Consecutive elements of their tensor that are consecutive elements of our parameter."""

    label: str
    """What it is, whatever the layout; for an expert, its name in the layout `experts`."""
    tensor: str
    """Their name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """First element in the tensor."""
    parameter: str
    """Our name of the parameter."""
    offset: int
    """First element in the parameter."""
    size: int
    """Number of elements."""
    pairs: Pairs | None = None
    """Rows that have another order in the parameter, of tensors whose rows are rotated in pairs of neighbours."""


def parts(family: Family, config: ModelConfig, vocab_size: int, layout: Layout) -> list[Part]:
    """All parts of a model of the family, in the order of its layers.

    Args:
        family: whose names to use.
        config: the `model` section.
        vocab_size: rows of the embedding.
        layout: how experts are stored.
    """
    found = [_whole("model.embed_tokens.weight", "embedding.weight", (vocab_size, config.d_model))]
    for layer in range(config.num_layers):
        found += _layer(family, config, layer, layout)
    found.append(_whole("model.norm.weight", "final_norm.weight", (config.d_model,)))
    if not config.tie_embeddings:
        found.append(_whole("lm_head.weight", "lm_head.weight", (vocab_size, config.d_model)))
    return found


def _layer(family: Family, config: ModelConfig, layer: int, layout: Layout) -> Iterator[Part]:
    theirs, ours, width = f"model.layers.{layer}", f"layers.{layer}", config.d_model
    yield _whole(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", (width,))
    attention = _latent_attention if family.is_latent else _attention
    yield from attention(config, f"{theirs}.self_attn", f"{ours}.attention")
    yield _whole(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight", (width,))
    if not config.is_moe_layer(layer):
        yield from _mlp(f"{theirs}.mlp", f"{ours}.mlp", width, config.dense_width)
    elif family.is_dense:
        yield from _mlp(f"{theirs}.mlp", f"{ours}.moe.experts", width, config.moe.expert_hidden)
    else:
        yield from _experts(family, config, theirs, f"{ours}.moe", layout)


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    attention, width = config.attention, config.head_dim
    heads, kv_heads = config.num_heads * width, config.num_kv_heads * width
    rows = {"q": heads, "k": kv_heads, "v": kv_heads, "out": config.d_model}
    for name, projection in PROJECTIONS.items():
        columns = heads if name == "out" else config.d_model
        yield _whole(f"{theirs}.{projection}.weight", f"{ours}.{name}", (rows[name], columns))
        if name in BIASED[attention.bias]:
            yield _whole(f"{theirs}.{projection}.bias", f"{ours}.{name}_bias", (rows[name],))
    if attention.qk_norm:
        for name in ("q", "k"):
            size = rows[name] if attention.qk_norm == "whole" else width
            yield _whole(f"{theirs}.{name}_norm.weight", f"{ours}.{name}_norm", (size,))


def _latent_attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The rotated rows are those at the end of each head's queries, and of the key that all heads share."""
    shapes = {spec.name: spec.shape for spec in latent_specs(config, out_std=0.0)}
    for name, shape in shapes.items():
        stem = name.removesuffix("_bias")
        whole = _whole(f"{theirs}.{LATENT[stem]}.{'weight' if stem == name else 'bias'}", f"{ours}.{name}", shape)
        rotated, columns = config.rope_dim, math.prod(shape[1:])
        periods = {"q": config.head_dim, "q_up": config.head_dim, "kv_down": shape[0]}
        period = periods.get(stem)
        yield replace(whole, pairs=Pairs(period, period - rotated, columns)) if period else whole


def _mlp(theirs: str, ours: str, width: int, hidden: int) -> Iterator[Part]:
    """A dense block; our w_in is their gate and, below it, their up projection."""
    for half, name in enumerate(("gate_proj", "up_proj")):
        tensor = f"{theirs}.{name}.weight"
        yield Part(tensor, tensor, (hidden, width), 0, f"{ours}.w_in", half * hidden * width, hidden * width)
    yield _whole(f"{theirs}.down_proj.weight", f"{ours}.w_out", (width, hidden))


def _experts(family: Family, config: ModelConfig, theirs: str, ours: str, layout: Layout) -> Iterator[Part]:
    moe, width = config.moe, config.d_model
    block = f"{theirs}.{family.expert_block if layout == 'experts' else 'mlp'}"
    gate = _whole(f"{block}.gate.weight", f"{ours}.router.weight", (moe.num_experts, width))
    yield replace(gate, label=f"{theirs}.{family.expert_block}.gate.weight")
    matrix = moe.expert_hidden * width
    for place, names in (("w_in", family.expert_names[:2]), ("w_out", family.expert_names[2:])):
        fused = f"{block}.experts.{'gate_up_proj' if place == 'w_in' else 'down_proj'}"
        rows = (2 * moe.expert_hidden, width) if place == "w_in" else (width, moe.expert_hidden)
        shape = (width, moe.expert_hidden) if place == "w_out" else (moe.expert_hidden, width)
        for expert in range(moe.num_experts):
            for number, name in enumerate(names):
                offset = (expert * len(names) + number) * matrix
                label = f"{theirs}.{family.expert_block}.experts.{expert}.{name}.weight"
                if layout == "fused":
                    whole = (moe.num_experts, *rows)
                    yield Part(label, fused, whole, offset, f"{ours}.experts.{place}", offset, matrix)
                else:
                    yield Part(label, label, shape, 0, f"{ours}.experts.{place}", offset, matrix)
    if family.router == "sigmoid_bias":
        yield _whole(f"{block}.gate.{CHOICE_BIAS}", f"{ours}.router.bias", (moe.num_experts,))
    if moe.num_shared_experts:
        shared = "shared_experts" if family.is_latent else "shared_expert"
        yield from _mlp(f"{block}.{shared}", f"{ours}.shared", width, moe.shared_width)
    if moe.num_shared_experts and family.has_shared_expert:
        yield _whole(f"{block}.shared_expert_gate.weight", f"{ours}.mixing.weight", (1, width))


def _whole(tensor: str, parameter: str, shape: tuple[int, ...]) -> Part:
    return Part(tensor, tensor, shape, 0, parameter, 0, math.prod(shape))
