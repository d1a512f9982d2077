"""The options that `moeport.torch.MoE` shares with `model.moe` of the config."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypedDict

from moeport.config import config_from_dict
from moeport.config.keys import suggest
from moeport.config.model import MoEConfig, MoELayerConfig
from moeport.errors import ConfigError

_BY_NAME = {"router": "name", "capacity": "policy"}
"""Sections that may be given as a string, and the key whose value it is."""


class MoEOptions(TypedDict, total=False):
    """Keywords of `moeport.torch.MoE` besides its explicit parameters: the keys of `model.moe` for one layer.

    A section is a mapping of its keys, or None for its defaults; `router` and `capacity` may also be given by name.
    """

    # generated: options (make generate)
    activation: Literal["swiglu", "gelu"]
    """Expert activation; SwiGLU is gated, GELU is not. Default: swiglu."""
    num_shared_experts: int
    """Experts of the same width that process every token, added with weight 1 (DeepSeekMoE). Default: 0."""
    shared_hidden: int | None
    """Hidden width of all shared experts together. Default: num_shared_experts * expert_hidden."""
    shared_mixing: Literal["add", "softmax", "sigmoid"] | None
    """How shared experts are combined with the routed ones: added with weight 1; both weighted by a learned two-way
    softmax (CartesianMoE); or added with a learned weight between 0 and 1 for each token (Qwen2-MoE). Default: softmax
    for cartesian, otherwise add."""
    residual_hidden: int
    """Hidden width of a dense block that processes every token alongside the experts (as in OpenMoE); 0: none. Default:
    0."""
    routed_scaling_factor: float
    """Multiplies the output of the routed experts (DeepSeek-V3 uses 2.5). Default: 1.0."""
    router: str | Mapping[str, Any] | None
    """The router, by name, with its own options; `moeport routers` lists them."""
    router_dtype: Literal["float32", "compute"]
    """Type of the operands of the router's matrix product: float32, or `backend.dtype`, which is faster on accelerators
    and rounds the scores. Scores, softmax and gates are in float32 either way. Default: float32."""
    capacity: str | Mapping[str, Any] | None
    """Expert capacity and drop policy."""
    load_balance: Mapping[str, Any] | None
    """Load-balancing loss."""
    router_z_loss: float
    """Weight of mean(logsumexp(router logits)^2) (ST-MoE, eq. 5). Default: 0.0."""
    # end of options


def layer_config(
    d_model: int, options: Mapping[str, Any], router_options: Mapping[str, Any], explicit: Collection[str]
) -> MoEConfig:
    """The checked section for a layer of width `d_model`.

    Args:
        d_model: width D.
        options: keys of `model.moe`.
        router_options: keys of the router, in addition to those in `options`.
        explicit: the explicit parameters of the layer, for the messages.

    Raises ConfigError if an option is unknown or out of range.
    """
    for name in options.keys() - MoELayerConfig.model_fields.keys():
        raise ConfigError(_unknown(name, explicit))
    moe = {"router": {"name": MoELayerConfig().router.name}, **dict(_sections(options)), "allow_future_tokens": True}
    if isinstance(moe["router"], dict):
        moe["router"] |= router_options
    # Heads of any valid attention, since there is none here; and the router may look at later tokens, since the model
    # around the layer need not be causal.
    model = {"d_model": d_model, "attention": {"num_heads": 1, "head_dim": 2}, "moe": moe}
    return config_from_dict({"model": model}).model.moe


def checked_kernels(kernels: str | Mapping[str, str]) -> str | dict[str, str]:
    """What is given as `kernels`, checked as `backend.kernels` of the config; raises ConfigError if that refuses it."""
    given = kernels if isinstance(kernels, str) else dict(kernels)
    try:
        return config_from_dict({"backend": {"kernels": given}}).backend.kernels
    except ConfigError as error:
        raise ConfigError(str(error).replace("backend.kernels", "kernels")) from None


def _sections(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options as in a config file: sections spelled out, defaults left out."""
    for name, value in options.items():
        if name in _BY_NAME and isinstance(value, str):
            yield name, {_BY_NAME[name]: value}
        elif value is not None:
            yield name, dict(value) if isinstance(value, Mapping) else value


def _unknown(name: str, explicit: Collection[str]) -> str:
    """The message for a keyword that no layer has."""
    if name in MoEConfig.model_fields:
        return f"{name}: model.moe.{name} applies to the layers of a whole model, but moeport.torch.MoE is one layer"
    known = [*explicit, *MoELayerConfig.model_fields]
    similar = [next(iter(get_close_matches(name, known, 1, cutoff)), "") for cutoff in (0.85, 0.6)]
    meant = similar[0] or _aliased(name, known) or similar[1]
    hint = f"did you mean {meant}?" if meant else f"expected one of {', '.join(known)}"
    return f"{name}: unknown option of moeport.torch.MoE; {hint}"


def _aliased(name: str, known: Collection[str]) -> str:
    """The option that an alias, or a key of a section, refers to; empty if there is none."""
    path = suggest(f"model.moe.{name}", MoEConfig) or ""
    section, _, key = path.removeprefix("model.moe.").partition(".")
    if section in known and key:
        return f"{'router_options' if section == 'router' else section}={{'{key}': ...}}"
    return next((option for option in (section, path.rpartition(".")[2]) if option in known), "")
