"""The sections of a config to config.json: what the family says in its own way, and what it cannot say.

The keys that are written are read back, and the model that they describe is compared with the one that was meant: a
setting that is not the same on both sides is one that the family cannot express.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeport.config.model import LoadBalanceConfig, ModelConfig
from moeport.convert.config_in import DIRECT, settings_of
from moeport.convert.deepseek import WIDTHS, expert_keys, latent_keys
from moeport.convert.family import FAMILIES, Family
from moeport.convert.rotary import rotary_canonical, rotary_keys
from moeport.routers import build_router
from moeport.routers.base import TopKRouterConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.topk import TopKConfig

TRAINING_ONLY = {
    "init_std": 0.02,
    "embedding_std": None,
    "output_z_loss": 0.0,
    "moe.router_z_loss": 0.0,
    "moe.router_dtype": "float32",
    "moe.router.noise_std": 0.0,
    "moe.rounded_rows": None,
    "moe.load_balance.scope": "batch",
    "moe.load_balance.coefficient": None,
}
"""Keys that change training but no logits, except by rounding, with the value that needs no mention."""


@dataclass(frozen=True)
class Difference:
    """A setting that a family has in another way."""

    key: str
    """Of the config, such as `model.moe.router.name`."""
    ours: Any
    theirs: Any
    """The nearest that the family has."""

    def __str__(self) -> str:
        return f"{self.key} is {self.ours}, and its nearest setting is {self.theirs}"


def keys_of(family: Family, model: ModelConfig, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    """The keys of config.json that come nearest to a model.

    Args:
        family: whose keys.
        model: the `model` section.
        vocab_size: rows of the embedding.
        sequence_length: for max_position_embeddings.
    """
    moe, attention = model.moe, model.attention
    keys: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in DIRECT.items()}
    keys |= {
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "rope_parameters": rotary_keys(model, family.is_latent),
    }
    if family.is_latent:
        return {**keys, **latent_keys(model, family.router), **expert_keys(model, family.router, _balance(model))}
    if family.has_head_dim:
        keys["head_dim"] = model.head_dim
    if family.bias in ("attention_bias", "qkv_bias"):
        keys[family.bias] = attention.bias != "none"
    if family.is_dense:
        return {**keys, "intermediate_size": moe.expert_hidden}
    layers, top_k = len(model.moe_layers), moe.router.experts_per_token
    if family.has_dense_layers:
        keys |= {"intermediate_size": model.dense_width, **_dense_layers(model)}
    keys |= {
        str(family.experts): moe.num_experts,
        family.expert_hidden: moe.expert_hidden,
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": _coefficient(model) * layers / top_k,
    }
    if family.normalized == "norm_topk_prob":
        keys["norm_topk_prob"] = _normalizes(model)
    if family.has_shared_expert:
        keys["shared_expert_intermediate_size"] = moe.shared_width or moe.expert_hidden
    return keys


def differences(family: Family, model: ModelConfig, vocab_size: int, keys: Mapping[str, Any]) -> list[Difference]:
    """The settings of a model that the keys of a config.json do not describe, except those in TRAINING_ONLY."""
    back = ModelConfig.model_validate(settings_of(family, keys, "config.json").model)
    ours, theirs = _canonical(model, vocab_size), _canonical(back, back.vocab_size)
    return [
        Difference(f"model.{key}", value, theirs.get(key))
        for key, value in ours.items()
        if value != theirs.get(key) and key not in TRAINING_ONLY
    ]


def unsaid(model: ModelConfig, family: Family) -> list[str]:
    """The settings for training that config.json has no key for, as `key: value`."""
    found = _canonical(model, model.vocab_size)
    keys = ["output_z_loss", "moe.router_z_loss", "moe.router_dtype", "moe.router.noise_std"]
    keys += (
        ["moe.load_balance.scope"] if family.balance != "aux_loss_alpha" or _balance(model).scope == "global" else []
    )
    lines = [f"model.{key}: {found[key]}" for key in keys if found[key] != TRAINING_ONLY[key]]
    if found["moe.rounded_rows"]:
        lines.append("model.moe.capacity.policy: round")
    coefficient = found["moe.load_balance.coefficient"]
    if family.is_dense and coefficient:
        lines.append(f"model.moe.load_balance.coefficient: {coefficient}")
    return lines


def balance_differs(family: Family, model: ModelConfig, keys: Mapping[str, Any]) -> bool:
    """Whether the load-balancing loss is not the one that the keys of a config.json describe."""
    if family.is_dense:
        return False
    now, default = keys_of(family, model, 0, 1), family.defaults[family.balance]
    before = {family.balance: float(keys.get(family.balance, default) or 0.0), "seq_aux": keys.get("seq_aux", True)}
    close = math.isclose(before[family.balance], now[family.balance], rel_tol=1e-9)
    return not close or (now.get("seq_aux", True) != before["seq_aux"] and now[family.balance] > 0)


def fitting(model: ModelConfig, vocab_size: int, sequence_length: int) -> tuple[Family, list[Difference]]:
    """The first family that has every setting of a model, or the one that lacks fewest, with what it lacks.

    Among those that lack equally many, one with the model's router is nearer than another.
    """
    found = []
    for family in sorted(FAMILIES, key=lambda family: family.is_dense != (model.moe.num_experts == 1)):
        keys = keys_of(family, model, vocab_size, sequence_length)
        found.append((family, differences(family, model, vocab_size, keys)))
    return min(found, key=lambda pair: (len(pair[1]), "model.moe.router.name" in {each.key for each in pair[1]}))


def _canonical(model: ModelConfig, vocab_size: int | None) -> dict[str, Any]:
    """The settings of a model by key, so that two models that compute the same have the same ones."""
    moe = model.moe
    dense = [layer for layer in range(model.num_layers) if not model.is_moe_layer(layer)]
    mixing = {0: "add", 1: "sigmoid", 2: "softmax"}[moe.mixing_rows]
    found = {
        "num_layers": model.num_layers,
        "d_model": model.d_model,
        "vocab_size": vocab_size,
        "tie_embeddings": model.tie_embeddings,
        "norm_eps": model.norm_eps,
        "init_std": model.init_std,
        "embedding_std": model.embedding_std,
        "output_z_loss": model.output_z_loss,
        **_attention(model),
        "dense_hidden": model.dense_width if dense else None,
        "moe.dense_layers": dense,
        "moe.num_experts": moe.num_experts,
        "moe.expert_hidden": moe.expert_hidden,
        "moe.activation": moe.activation,
        "moe.shared_hidden": moe.shared_width,
        "moe.shared_mixing": mixing if moe.num_shared_experts else None,
        "moe.residual_hidden": moe.residual_hidden,
        "moe.residual_form": moe.residual_form if moe.residual_hidden else None,
        "moe.routed_scaling_factor": moe.routed_scaling_factor,
        "moe.capacity.policy": "dropless" if moe.capacity.policy == "round" else moe.capacity.policy,
        "moe.rounded_rows": moe.capacity.tile if moe.capacity.policy == "round" else None,
        "moe.router_z_loss": moe.router_z_loss,
        "moe.router_dtype": moe.router_dtype,
        "moe.router.noise_std": getattr(moe.router, "noise_std", 0.0),
        "moe.load_balance.scope": moe.load_balance.scope,
        "moe.load_balance.coefficient": _coefficient(model),
    }
    router = moe.router
    if not isinstance(router, TopKConfig | SigmoidBiasConfig):
        return {**found, "moe.router.name": router.name}
    return {
        **found,
        "moe.router.name": router.name,
        "moe.router.top_k": router.top_k,
        "moe.router.normalize_gates": _normalizes(model) or (router.name == "topk" and moe.num_experts == 1),
        "moe.router.num_groups": router.num_groups if router.limits_groups else 1,
        "moe.router.top_groups": router.top_groups if router.limits_groups else 1,
    }


def _attention(model: ModelConfig) -> dict[str, Any]:
    """The settings of attention that have an effect."""
    attention = model.attention
    if attention.kind == "grouped":
        own: dict[str, Any] = {"num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
        own["qk_norm"] = attention.qk_norm
    else:
        own = {key: getattr(attention, key) for key in ("q_lora_rank", "latent_norm_eps", *WIDTHS)}
    own |= {"kind": attention.kind, "num_heads": model.num_heads, "bias": attention.bias}
    return {f"attention.{key}": value for key, value in own.items()} | rotary_canonical(model)


def _normalizes(model: ModelConfig) -> bool:
    router = model.moe.router
    return router.gates_sum_to_one if isinstance(router, TopKRouterConfig) else True


def _coefficient(model: ModelConfig) -> float:
    """Weight of each layer's load-balancing loss."""
    moe = model.moe
    if moe.load_balance.coefficient is not None:
        return moe.load_balance.coefficient
    return build_router(moe.router, model.d_model, moe.num_experts, vocab_size=1).load_balance


def _balance(model: ModelConfig) -> LoadBalanceConfig:
    return LoadBalanceConfig(coefficient=_coefficient(model), scope=model.moe.load_balance.scope)


def _dense_layers(model: ModelConfig) -> dict[str, Any]:
    """decoder_sparse_step and mlp_only_layers: our step where theirs has it, otherwise a list of all dense layers."""
    every = model.moe.every if model.moe.first_dense % model.moe.every == 0 else 1
    stepped = {*range(every - 1, model.num_layers, every)}
    return {"decoder_sparse_step": every, "mlp_only_layers": sorted(stepped - {*model.moe_layers})}
