"""Latent attention and experts of DeepSeek-V2 and V3 in config.json, read and written.

Where DeepSeek's own code and the classes of transformers compute different things, the value is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moeport.config.model import LoadBalanceConfig, ModelConfig
from moeport.convert.keys import Keys, shown
from moeport.convert.rotary import rotary_settings
from moeport.errors import UserError
from moeport.routers.groups import GroupLimitedConfig
from moeport.routers.topk import TopKConfig

MTP = "num_nextn_predict_layers"
"""The key of the layers that predict further tokens, which come after the others."""
MTP_KEYS = (MTP, "num_mtp_layers")
"""The names that transformers takes for it."""
WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Keys that are keys of `model.attention` under the same name."""
_METHODS = ("greedy", "group_limited_greedy")
"""Values of topk_method in DeepSeek-V2."""


def latent_settings(keys: Keys) -> dict[str, Any]:
    """`model.attention`."""
    heads, width = keys.integer("num_attention_heads"), keys.integer("qk_rope_head_dim")
    section: dict[str, Any] = {"kind": "mla", "num_heads": heads}
    section["q_lora_rank"] = keys.get("q_lora_rank", (int, type(None)))
    section |= {key: keys.integer(key) for key in WIDTHS}
    for key, wanted in {
        "num_key_value_heads": heads,
        "head_dim": width,
        "qk_head_dim": section["qk_nope_head_dim"] + width,
    }.items():
        keys.asked.add(key)
        given = keys.values.get(key, wanted)
        if given != wanted and not (given is None and key == "num_key_value_heads"):
            raise UserError(
                f"{keys.place}: {key} is {shown(given)}; expected {wanted}, as multi-head latent attention has it"
            )
    section["bias"] = "all" if keys.flag("attention_bias") else "none"
    return {**section, **rotary_settings(keys)}


def expert_settings(keys: Keys) -> dict[str, Any]:
    """`model.moe` and `model.dense_hidden`."""
    layers, dense = keys.integer("num_hidden_layers"), keys.get("first_k_dense_replace", (int,))
    if not 0 <= dense < layers:
        raise UserError(
            f"{keys.place}: first_k_dense_replace is {dense}, of {layers} layers; expected at least one with experts"
        )
    return {
        "dense_hidden": keys.integer("intermediate_size"),
        "moe": {
            "num_experts": keys.integer("n_routed_experts"),
            "expert_hidden": keys.integer("moe_intermediate_size"),
            "first_dense": dense,
            "num_shared_experts": keys.integer("n_shared_experts"),
            "shared_mixing": "add",
            "routed_scaling_factor": keys.number("routed_scaling_factor"),
            "router": _router(keys),
            "load_balance": _balance(keys),
        },
    }


def _router(keys: Keys) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": keys.family.router,
        "top_k": keys.integer("num_experts_per_tok"),
        "normalize_gates": keys.flag("norm_topk_prob"),
    }
    if found["name"] == "sigmoid_bias" and found["top_k"] == 1:
        found["normalize_single_gate"] = found["normalize_gates"]
    limited = True
    if keys.family.router == "topk":
        method = keys.get("topk_method", (str,))
        if method not in _METHODS:
            raise UserError(f"{keys.place}: topk_method is {shown(method)}; expected {' or '.join(_METHODS)}")
        limited = method == "group_limited_greedy"
    keys.asked |= {"n_group", "topk_group"}
    if not limited:
        return found
    groups, experts = keys.integer("n_group"), keys.integer("n_routed_experts")
    if keys.family.router == "sigmoid_bias" and groups > 1 and experts < 2 * groups:
        raise UserError(
            f"{keys.place}: n_group is {groups}, of {experts} experts; expected groups of two or more, since "
            "transformers adds up the two best scores of a group"
        )
    return {**found, "num_groups": groups, "top_groups": keys.integer("topk_group")}


def _balance(keys: Keys) -> dict[str, Any]:
    """DeepSeek's code adds this loss per layer, as moeport does; transformers does not know it."""
    weight = keys.get("aux_loss_alpha", (int, float, type(None)))
    by_sequence = keys.get("seq_aux", (bool, type(None)))
    return {
        "coefficient": float(weight or 0.0),
        "scope": "sequence" if weight and by_sequence is not False else "batch",
    }


def latent_keys(model: ModelConfig, router: str) -> dict[str, Any]:
    """The keys of attention, except those that every family has; `router` is ours, of the family."""
    attention = model.attention
    # The class of V2 refuses a hidden_size that is no multiple of the heads.
    heads = math.gcd(model.num_heads, model.d_model) if router == "topk" else model.num_heads
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": attention.q_lora_rank,
        **{key: getattr(attention, key) for key in WIDTHS},
        "attention_bias": attention.bias == "all",
    }


def expert_keys(model: ModelConfig, router: str, balance: LoadBalanceConfig) -> dict[str, Any]:
    """The keys of the experts that come nearest to a model.

    Args:
        model: the `model` section.
        router: ours, of the family.
        balance: the load-balancing loss, with its coefficient.
    """
    moe = model.moe
    groups = moe.router if isinstance(moe.router, GroupLimitedConfig) else TopKConfig()
    number, top = (groups.num_groups, groups.top_groups) if groups.limits_groups else (1, 1)
    if router == "sigmoid_bias":
        number = max(1, min(number, moe.num_experts // 2))  # transformers adds up two scores of a group
    found = {
        "n_routed_experts": max(moe.num_experts, 1 if router == "topk" else 2),
        "moe_intermediate_size": moe.expert_hidden,
        "intermediate_size": model.dense_width,
        "first_k_dense_replace": min(_first_moe_layer(model), model.num_layers - 1),
        "n_shared_experts": max(1, moe.shared_width // moe.expert_hidden),
        "routed_scaling_factor": moe.routed_scaling_factor,
        "num_experts_per_tok": moe.router.experts_per_token,
        "n_group": number,
        "topk_group": min(top, number),
        "aux_loss_alpha": balance.coefficient,
        "seq_aux": balance.scope == "sequence",
    }
    if router == "topk":
        return {**found, "topk_method": _METHODS[groups.limits_groups], "norm_topk_prob": False}
    return {**found, "norm_topk_prob": groups.gates_sum_to_one, MTP: 0}


def _first_moe_layer(model: ModelConfig) -> int:
    return min(model.moe_layers, default=0)


def prediction_tensors(names: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """The names of tensors that belong to layers of multi-token prediction.

    Args:
        names: the tensors of a folder.
        values: its config.json.
    """
    layers, more = values.get("num_hidden_layers"), next((values[key] for key in MTP_KEYS if key in values), None)
    if type(layers) is not int or type(more) is not int:
        return []
    prefixes = tuple(f"model.layers.{layers + number}." for number in range(min(more, len(names))))
    return sorted(name for name in names if name.startswith(prefixes))
