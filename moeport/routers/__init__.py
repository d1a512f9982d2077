"""Routers by name.

A new router is a module here with a config (a `RouterConfig` with a literal `name`) and a `Router` class, and a row in
`ROUTERS`; config, layer, command line and conformance tests then know it.
"""

from __future__ import annotations

from typing import Any

from moeport.routers.adamoe import AdaMoEConfig, AdaMoERouter
from moeport.routers.base import Router, RouterConfig
from moeport.routers.base_layers import BaseLayersConfig, BaseLayersRouter
from moeport.routers.cartesian import CartesianConfig, CartesianRouter
from moeport.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from moeport.routers.gshard import GShardConfig, GShardRouter
from moeport.routers.hash import HashConfig, HashRouter
from moeport.routers.locmoe import LocMoEConfig, LocMoERouter
from moeport.routers.locmoe_plus import LocMoEPlusConfig, LocMoEPlusRouter
from moeport.routers.maskmoe import MaskMoEConfig, MaskMoERouter
from moeport.routers.random import RandomConfig, RandomRouter
from moeport.routers.rre import RREConfig, RRERouter
from moeport.routers.sigmoid_bias import SigmoidBiasConfig, SigmoidBiasRouter
from moeport.routers.sinkhorn import SinkhornTokenChoiceConfig, SinkhornTokenChoiceRouter
from moeport.routers.sinkhorn_expert_choice import SinkhornExpertChoiceConfig, SinkhornExpertChoiceRouter
from moeport.routers.soft import SoftConfig, SoftRouter
from moeport.routers.sparsity_constrained import (
    SparsityConstrainedExpertChoiceConfig,
    SparsityConstrainedExpertChoiceRouter,
)
from moeport.routers.switch import SwitchConfig, SwitchRouter
from moeport.routers.top_p import TopPConfig, TopPRouter
from moeport.routers.topk import TopKConfig, TopKRouter
from moeport.routers.xmoe import XMoEConfig, XMoERouter

RouterChoice = (
    SwitchConfig
    | TopKConfig
    | GShardConfig
    | SigmoidBiasConfig
    | TopPConfig
    | AdaMoEConfig
    | XMoEConfig
    | SinkhornTokenChoiceConfig
    | CartesianConfig
    | BaseLayersConfig
    | ExpertChoiceConfig
    | SinkhornExpertChoiceConfig
    | SparsityConstrainedExpertChoiceConfig
    | SoftConfig
    | LocMoEConfig
    | LocMoEPlusConfig
    | HashConfig
    | RREConfig
    | RandomConfig
    | MaskMoEConfig
)
"""The config of any router; the key `name` says which."""

ROUTERS: dict[str, tuple[type[RouterConfig], type[Router[Any]]]] = {
    "switch": (SwitchConfig, SwitchRouter),
    "topk": (TopKConfig, TopKRouter),
    "gshard": (GShardConfig, GShardRouter),
    "sigmoid_bias": (SigmoidBiasConfig, SigmoidBiasRouter),
    "top_p": (TopPConfig, TopPRouter),
    "adamoe": (AdaMoEConfig, AdaMoERouter),
    "xmoe": (XMoEConfig, XMoERouter),
    "sinkhorn_token_choice": (SinkhornTokenChoiceConfig, SinkhornTokenChoiceRouter),
    "cartesian": (CartesianConfig, CartesianRouter),
    "base": (BaseLayersConfig, BaseLayersRouter),
    "expert_choice": (ExpertChoiceConfig, ExpertChoiceRouter),
    "sinkhorn_expert_choice": (SinkhornExpertChoiceConfig, SinkhornExpertChoiceRouter),
    "sparsity_constrained_expert_choice": (
        SparsityConstrainedExpertChoiceConfig,
        SparsityConstrainedExpertChoiceRouter,
    ),
    "soft": (SoftConfig, SoftRouter),
    "locmoe": (LocMoEConfig, LocMoERouter),
    "locmoe_plus": (LocMoEPlusConfig, LocMoEPlusRouter),
    "hash": (HashConfig, HashRouter),
    "rre": (RREConfig, RRERouter),
    "random": (RandomConfig, RandomRouter),
    "maskmoe": (MaskMoEConfig, MaskMoERouter),
}
"""Name to config and router class."""


def build_router(
    config: RouterConfig, d_model: int, num_experts: int, init_std: float = 0.02, vocab_size: int | None = None
) -> Router[Any]:
    """The router that `config` names; `vocab_size` V is for those that look at token ids."""
    return ROUTERS[config.name][1](config, d_model, num_experts, init_std, vocab_size)
