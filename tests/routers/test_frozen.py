"""Routers with one choice per token: whether the gate trains the router, and what `config check` says if not."""

from typing import Any

import numpy as np
import pytest

from moeport.cli.config import warnings
from moeport.config import config_from_dict
from moeport.routers import BY_NAME
from moeport.routers.base import TopKRouterConfig
from moeport.routers.maskmoe import MaskMoEConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.topk import TopKConfig
from tests.routers.examples import EXPERTS, build, label, route, router_params, trained_weight
from tests.support import grid

ONE_CHOICE: list[Any] = [
    *(
        router.config_class.model_validate({"top_k": 1})
        for router in BY_NAME.values()
        if issubclass(router.config_class, TopKRouterConfig)
        and trained_weight(build(router.config_class.model_validate({})))
    ),
    TopKConfig(top_k=1, softmax="after"),
    TopKConfig(top_k=1, normalize_gates=False),
    SigmoidBiasConfig(top_k=1, normalize_single_gate=True),
    MaskMoEConfig(top_k=1, visible_frequent=3),
]


@pytest.mark.parametrize("config", ONE_CHOICE, ids=label)
def test_a_warning_is_given_exactly_where_no_gate_depends_on_the_router(config):
    params = router_params(build(config))
    moved = params | {"weight": params["weight"] + 1e-6 * grid(40, *params["weight"].shape)}
    before, after = route(config, params, training=False), route(config, moved, training=False)
    assert before.expert_N.tolist() == after.expert_N.tolist()
    frozen = np.abs(before.weight_N - after.weight_N).max() < 1e-12
    assert bool(config.warnings(EXPERTS)) == frozen
    assert config.warnings(1) == []


@pytest.mark.parametrize("name", ["topk", "cartesian", "maskmoe", "adamoe"])
def test_the_warning_names_the_key_and_what_to_set_instead(name):
    def lines(**options):
        return warnings(config_from_dict({"model": {"moe": {"router": {"name": name, **options}}}}))

    [line] = lines(top_k=1)
    instead = "softmax before and normalize_gates false, or top_k to 2 or more" if name == "topk" else "it to 2 or more"
    assert line == (
        "warning: model.moe.router.top_k: a single gate divided by itself is 1, so only auxiliary losses train the "
        f"router; set {instead}"
    )
    assert lines(top_k=2) == []


def test_ids_that_all_see_one_expert_are_fixed_routing_and_no_mistake():
    assert MaskMoEConfig(top_k=1, visible_frequent=1).warnings(EXPERTS) == []
