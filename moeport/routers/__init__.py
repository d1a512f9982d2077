"""Routers by name.

A new router is a module here, with a config (a `RouterConfig` with a literal `name`) and a `Router` of it, and its
class in `REGISTRY`; config, layer, command line, documentation and shared tests then know it.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from moeport.routers.adamoe import AdaMoERouter
from moeport.routers.base import Router, RouterConfig
from moeport.routers.base_layers import BaseLayersRouter
from moeport.routers.cartesian import CartesianRouter
from moeport.routers.expert_choice import ExpertChoiceRouter
from moeport.routers.forced import ForcedBalanceRouter, ForcedBiasRouter
from moeport.routers.gshard import GShardRouter
from moeport.routers.hash import HashRouter
from moeport.routers.locmoe import LocMoERouter
from moeport.routers.locmoe_plus import LocMoEPlusRouter
from moeport.routers.maskmoe import MaskMoERouter
from moeport.routers.random import RandomRouter
from moeport.routers.rre import RRERouter
from moeport.routers.sigmoid_bias import SigmoidBiasRouter
from moeport.routers.sinkhorn import SinkhornTokenChoiceRouter
from moeport.routers.sinkhorn_expert_choice import SinkhornExpertChoiceRouter
from moeport.routers.soft import SoftRouter
from moeport.routers.sparsity_constrained import SparsityConstrainedExpertChoiceRouter
from moeport.routers.switch import SwitchRouter
from moeport.routers.top_p import TopPRouter
from moeport.routers.topk import TopKRouter
from moeport.routers.xmoe import XMoERouter

REGISTRY: tuple[type[Router[Any]], ...] = (
    SwitchRouter,
    TopKRouter,
    GShardRouter,
    SigmoidBiasRouter,
    TopPRouter,
    AdaMoERouter,
    XMoERouter,
    SinkhornTokenChoiceRouter,
    CartesianRouter,
    BaseLayersRouter,
    ExpertChoiceRouter,
    SinkhornExpertChoiceRouter,
    SparsityConstrainedExpertChoiceRouter,
    SoftRouter,
    LocMoERouter,
    LocMoEPlusRouter,
    HashRouter,
    RRERouter,
    RandomRouter,
    MaskMoERouter,
    ForcedBalanceRouter,
    ForcedBiasRouter,
)
"""Every router, in the order of lists and messages. Each names its config: `Router[SwitchConfig]`."""

BY_NAME = {router.config_class.model_fields["name"].default: router for router in REGISTRY}
"""Name to router class."""

ROUTERS = {name: (router.config_class, router) for name, router in BY_NAME.items()}
"""Name to the classes of its config and router, for users of the library."""

if TYPE_CHECKING:
    RouterChoice = RouterConfig
else:
    RouterChoice = reduce(or_, (router.config_class for router in REGISTRY))
"""The config of any router; the key `name` says which. To the type checker it is what all of them share."""


def build_router(
    config: RouterConfig, d_model: int, num_experts: int, init_std: float = 0.02, vocab_size: int | None = None
) -> Router[Any]:
    """The router that `config` names; `vocab_size` V is for those that look at token ids."""
    return BY_NAME[config.name](config, d_model, num_experts, init_std, vocab_size)
