"""The rules and the tables of keys themselves."""

import pytest

from moeport.config import Config, check_rules
from moeport.config.keys import ALIASES, keys, suggest
from moeport.config.model import CapacityConfig, ModelConfig, MoEConfig
from moeport.config.rules import EFFECTS, RULES
from moeport.config.training import BackendConfig, TrainingConfig
from moeport.routers import BY_NAME
from moeport.routers.topk import TopKConfig

PATHS = {key.path for key in keys()}


def test_default_breaks_no_rule():
    assert check_rules(Config()) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_every_router_has_sound_defaults(name):
    config = BY_NAME[name].config_class
    moe = MoEConfig(router=config.model_validate({}), allow_future_tokens=config.looks_ahead)
    assert check_rules(Config(model=ModelConfig(moe=moe))) == []


def test_config_made_in_python():
    config = Config(
        training=TrainingConfig(batch_size=10, gradient_accumulation=4),
        backend=BackendConfig(name="numpy", compile=True),
        model=ModelConfig(moe=MoEConfig(num_experts=4, router=TopKConfig(top_k=8))),
    )
    assert [problem.key for problem in check_rules(config)] == [
        "training.gradient_accumulation",
        "backend.compile",
        "model.moe.router.top_k",
    ]


def test_default_of_an_idle_option_needs_an_explicit_selector():
    def found(capacity: CapacityConfig) -> list[str]:
        return [problem.key for problem in check_rules(Config(model=ModelConfig(moe=MoEConfig(capacity=capacity))))]

    assert found(CapacityConfig(factor=1.25)) == ["model.moe.capacity.factor"]
    assert found(CapacityConfig(policy="dropless", factor=2.0)) == ["model.moe.capacity.factor"]
    assert found(CapacityConfig(policy="dropless", factor=1.25)) == []
    assert found(CapacityConfig(policy="factor", factor=2.0)) == []


def test_rules_read_keys_of_the_schema():
    reads = {path for rule in RULES for path in rule.reads}
    reads |= {path for effect in EFFECTS for path in (effect.option, effect.selector)}
    assert reads <= PATHS


def test_aliases_are_foreign_names_of_keys_of_the_schema():
    assert ALIASES.keys() <= PATHS
    foreign = [alias for aliases in ALIASES.values() for alias in aliases.split()]
    assert len(foreign) == len(set(foreign))
    assert not {path.rpartition(".")[2] for path in PATHS} & set(foreign)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.num_expert", "model.moe.num_experts"),
        ("model.top_k", "model.moe.router.top_k"),
        ("model.moe.router.topk", "model.moe.router.top_k"),
        ("model.attention.num_head", "model.attention.num_heads"),
        ("model.moe.capacity_factor", "model.moe.capacity.factor"),
        ("model.router", "model.moe.router"),
        ("training.warmup", "optimizer.schedule.warmup_steps"),
        ("training.expert_num", "model.moe.num_experts"),
        ("optimiser", "optimizer"),
        ("optimizer.beta_1", "optimizer.beta1"),
        ("checkpoint.intervall", "checkpoint.interval"),
        ("parallelism.expert_parallel_degree", "parallelism.expert"),
        ("seq_len", "data.sequence_length"),
        ("sequence_len", "data.sequence_length"),
        ("model.name", None),
    ],
)
def test_suggestions(key, meant):
    section = next((k.section for k in keys() if k.path.rpartition(".")[0] == key.rpartition(".")[0]), Config)
    assert suggest(key, section) == meant
