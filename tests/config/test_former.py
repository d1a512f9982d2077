"""Configs that earlier versions wrote, with every key and the defaults of their time."""

import pytest

from moeport.config import config_from_dict, load_config, resolved_yaml
from moeport.config.model import CapacityConfig
from moeport.errors import ConfigError

FORMER = {
    "policy": "dropless",
    "tile": 128,
    "factor": 1.25,
    "drop": "position",
    "floor": 4,
    "bound": "incomplete_beta",
    "probability": "exact",
    "target": "expectation",
    "failure": 0.05,
    "rule": "controller",
    "delta": None,
    "quantile": 0.9,
    "ema_decay": 0.9,
    "update_interval": 1,
    "freeze_after": None,
}
"""The capacity of a resolved config before its estimator counted other experts' tokens only."""


def config(capacity, **options):
    return config_from_dict({"model": {"moe": {"capacity": FORMER | capacity}}}, **options)


@pytest.mark.parametrize("policy", ["dropless", "factor", "round"])
@pytest.mark.parametrize("recorded", [False, True])
def test_former_defaults_without_effect_are_those_of_today(policy, recorded):
    assert config({"policy": policy}, recorded=recorded).model.moe.capacity == CapacityConfig(policy=policy)


def test_the_former_rule_stays_the_rule():
    """Its quantile was of no effect, and is not taken for the share that is given up."""
    capacity = config({"policy": "locmoe_plus"}).model.moe.capacity
    assert (capacity.rule, capacity.estimator, capacity.delta_quantile) == ("controller", "quantile", 0.1)


RECORDED = {
    "a former name": ({"policy": "locmoe"}, "probability: is not a choice"),
    "a high quantile": ({"policy": "locmoe_plus", "delta": "quantile"}, "quantile: is the share"),
    "the mean": ({"policy": "locmoe_plus", "delta": "mean"}, "delta: gives up about half"),
}


@pytest.mark.parametrize(("capacity", "message"), RECORDED.values(), ids=RECORDED)
def test_what_is_refused_today_can_be_read_where_it_was_recorded(capacity, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config(capacity)
    found = config(capacity, recorded=True).model.moe.capacity
    assert found.probability == "independent"
    assert found.delta == capacity.get("delta")
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{moe: {{capacity: {FORMER | capacity}}}}}\n".replace("None", "null"))
    assert load_config(file, recorded=True).model.moe.capacity == found


def test_a_former_default_that_is_overridden_takes_its_effect(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{moe: {{capacity: {FORMER}}}}}\n".replace("None", "null"))
    capacity = load_config(file, ["model.moe.capacity.policy=locmoe"]).model.moe.capacity
    assert capacity.probability == "independent"
    assert "probability: independent" in resolved_yaml(load_config(file))
