"""config.json of transformers to the sections `model` and `data`: every key is translated, carried along or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moeport.config.model import MOST_LAYERS
from moeport.convert.deepseek import MTP, expert_settings, latent_settings
from moeport.convert.family import Family
from moeport.convert.keys import Keys, shown
from moeport.convert.rotary import rotary_settings
from moeport.errors import UserError

DIRECT = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
"""Keys that are keys of `model` under another name."""

ALWAYS = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "per_layer_config": None,
    "auto_map": None,
}
"""Keys for which moeport has this value only, whatever the family."""


@dataclass(frozen=True)
class Settings:
    """What config.json says, in moeport's keys."""

    model: dict[str, Any]
    """The `model` section."""
    sequence_length: int
    """max_position_embeddings."""


def settings_of(family: Family, values: Mapping[str, Any], place: str, ignored: Collection[str] = ()) -> Settings:
    """The settings that a config.json gives.

    Args:
        family: the family of its model_type.
        values: its keys.
        place: names the file in messages.
        ignored: keys that are taken to have no effect.

    Raises UserError, which names the first key that cannot be translated.
    """
    keys = Keys(family, values, place)
    for key, wanted in fixed_values(family, values).items():
        if key not in ignored:
            keys.only(key, wanted)
    _check_architecture(keys)
    model: dict[str, Any] = {
        ours: keys.get(theirs, (bool,) if theirs == "tie_word_embeddings" else (int, float))
        for theirs, ours in DIRECT.items()
    }
    positions = keys.integer("max_position_embeddings")
    _check_window(keys, positions)
    model["attention"] = latent_settings(keys) if family.is_latent else _attention(keys)
    if family.is_latent:
        model |= expert_settings(keys)
    else:
        model |= _dense_blocks(keys) if family.is_dense else _experts(keys)
    if MTP in family.defaults:
        keys.get(MTP, (int, type(None)))  # its layers are tensors, which from_hf looks for
    keys.refuse_others(ignored)
    return Settings(model, positions)


def fixed_values(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys for which moeport has one value only, with that value."""
    own = {"auto_map": dict(family.own_code)} if family.own_code and values.get("auto_map") == family.own_code else {}
    return {**ALWAYS, **family.only, **own}


def _check_architecture(keys: Keys) -> None:
    wanted, given = keys.family.architecture, keys.values.get("architectures")
    if given is not None and given != [wanted]:
        raise UserError(f"{keys.place}: architectures is {shown(given)}; expected {shown([wanted])}, a language model")


def _attention(keys: Keys) -> dict[str, Any]:
    family, values = keys.family, keys.values
    heads, kv_heads = keys.integer("num_attention_heads"), keys.get("num_key_value_heads", (int, type(None)))
    section: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "qk_norm": family.qk_norm}
    width = keys.get("hidden_size", (int,))
    if family.has_head_dim:
        section["head_dim"] = keys.get("head_dim", (int, type(None)))
    elif values.get("head_dim") in (None, width // heads):
        keys.asked.add("head_dim")
    if family.bias in ("none", "qkv"):
        section["bias"] = family.bias
    else:
        given = keys.flag(family.bias)
        section["bias"] = {"qkv_bias": "qkv", "attention_bias": "all"}[family.bias] if given else "none"
    return {**section, **rotary_settings(keys)}


def _check_window(keys: Keys, positions: int) -> None:
    """Refuse attention to less than all earlier positions, unless the window is as long as any sequence."""
    family = keys.family
    if family.window is None:
        return
    types = keys.get("layer_types", (list, type(None))) if "layer_types" in family.defaults else None
    known = ("full_attention", "sliding_attention")
    if types is not None and (
        len(types) != keys.integer("num_hidden_layers") or not all(kind in known for kind in types)
    ):
        raise UserError(f"{keys.place}: layer_types is {shown(types)}; expected full_attention for each layer")
    window = keys.get("sliding_window", (int, type(None)))
    is_on = family.window == "sliding_window" or keys.flag("use_sliding_window")
    is_on = is_on if types is None else "sliding_attention" in types
    if is_on and window and window < positions:
        raise UserError(
            f"{keys.place}: sliding_window is {window}: moeport attends to all earlier positions, up to "
            f"{positions} (max_position_embeddings); expected null, or a max_position_embeddings of at most {window}"
        )


def _dense_blocks(keys: Keys) -> dict[str, Any]:
    """A feed-forward block as a mixture of one expert: its gate is 1 whatever the router says."""
    router = {"name": "topk", "top_k": 1}
    hidden = keys.integer("intermediate_size")
    return {"moe": {"num_experts": 1, "expert_hidden": hidden, "router": router, "load_balance": {"coefficient": 0.0}}}


def _experts(keys: Keys) -> dict[str, Any]:
    family = keys.family
    top_k, experts = keys.integer("num_experts_per_tok"), keys.integer(str(family.experts))
    normalize = True if family.normalized == "always" else keys.flag("norm_topk_prob")
    moe: dict[str, Any] = {
        "num_experts": experts,
        "expert_hidden": keys.integer(family.expert_hidden),
        "router": {"name": "topk", "top_k": top_k, "normalize_gates": normalize},
    }
    found: dict[str, Any] = {"moe": moe}
    layers = sparse = keys.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UserError(f"{keys.place}: num_hidden_layers is {layers}; expected at most {MOST_LAYERS}")
    if family.has_dense_layers:
        dense = keys.get("mlp_only_layers", (list, type(None))) or []
        if not all(type(layer) is int and layer >= 0 for layer in dense):
            raise UserError(f"{keys.place}: mlp_only_layers is {shown(dense)}; expected numbers of layers")
        dense = sorted({layer for layer in dense if layer < layers})
        every = keys.integer("decoder_sparse_step")
        sparse = len({*range(every - 1, layers, every)} - {*dense})
        moe |= {"every": every, "dense_layers": dense}
        found["dense_hidden"] = keys.integer("intermediate_size")
    if sparse == 0:
        raise UserError(f"{keys.place}: decoder_sparse_step and mlp_only_layers leave no layer with experts")
    if family.has_shared_expert:
        hidden, width = keys.integer("shared_expert_intermediate_size"), moe["expert_hidden"]
        many = hidden // width if hidden % width == 0 else 1
        moe |= {"num_shared_experts": many, "shared_mixing": "sigmoid"}
        moe |= {} if many * width == hidden else {"shared_hidden": hidden}
    coefficient = keys.number("router_aux_loss_coef") * top_k / sparse
    moe["load_balance"] = {"coefficient": coefficient}
    return found
