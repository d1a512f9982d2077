"""Runs that no machine could hold are refused before anything is allocated."""

import pytest

from moeport.config import config_from_dict
from moeport.errors import UserError
from moeport.model.build import build_model
from moeport.training import host_memory

MODEL = {"num_layers": 2, "d_model": 32, "attention": {"num_heads": 2}}


def check(model=None, moe=None, micro_batch=2, sequence_length=32):
    moe = {"num_experts": 4} | (moe or {})
    sections = {"model": MODEL | (model or {}) | {"moe": moe}, "data": {"sequence_length": sequence_length}}
    config = config_from_dict(sections)
    shapes = build_model(config.model, config.data, 257)
    host_memory.check_memory(config, shapes.parameter_specs(), micro_batch)


@pytest.mark.parametrize("key", ["num_experts", "expert_hidden", "num_shared_experts"])
def test_experts(key):
    with pytest.raises(UserError, match=r"model: its parameters need .* GiB and this machine has .* GiB; the largest"):
        check(moe={key: 10**9})


def test_width_and_sequences():
    with pytest.raises(UserError, match="model: its parameters need"):
        check(model={"d_model": 10**9})
    with pytest.raises(UserError, match="micro-batch of 1,000,000,000 x 32 tokens"):
        check(micro_batch=10**9)
    with pytest.raises(UserError, match="micro-batch of 2 x 1,000,000,000 tokens"):
        check(sequence_length=10**9)


def test_what_fits_is_taken():
    check()


def test_a_machine_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.delattr(host_memory.os, "sysconf")
    check(moe={"num_experts": 10**9})


def bytes_of(ranks, backend="torch", **parallelism):
    model, moe = MODEL | {"tie_embeddings": True}, {"num_experts": 4, "expert_hidden": 1000}
    sections = {"model": model | {"moe": moe}, "backend": {"name": backend}, "parallelism": parallelism}
    config = config_from_dict(sections)
    specs = build_model(config.model, config.data, 257).parameter_specs()
    experts = sum(4 * spec.size for spec in specs if spec.is_expert)
    others = sum(4 * spec.size for spec in specs if not spec.is_expert)
    return host_memory.rank_parameter_bytes(config, specs, ranks), experts, others


def test_a_rank_holds_its_part():
    held, experts, others = bytes_of(4)
    assert held == (experts + others) / 4
    assert bytes_of(4, expert=2)[0] == held
    assert bytes_of(4, expert=2, shard=False)[0] == experts / 2 + others
    assert bytes_of(4, "mindspore", expert=4)[0] == experts / 4 + others
    assert bytes_of(1, expert=4)[0] == experts + others


def test_the_parameters_of_all_ranks_of_a_machine_count(monkeypatch):
    config = config_from_dict({"model": MODEL | {"moe": {"num_experts": 4}}, "parallelism": {"shard": False}})
    specs = build_model(config.model, config.data, 257).parameter_specs()
    need = host_memory.rank_parameter_bytes(config, specs, 2)
    monkeypatch.setattr(host_memory, "physical_memory", lambda: 1.5 * need)
    host_memory.check_memory(config, specs, 1, 2, ranks_here=1)
    with pytest.raises(UserError, match=r"model: its parameters on 2 ranks need .* GiB and this machine has"):
        host_memory.check_memory(config, specs, 1, 2, ranks_here=2)
