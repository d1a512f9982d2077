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
    host_memory.check_memory(config, shapes.parameter_specs(), micro_batch, 1, host_memory.Room())


@pytest.mark.parametrize("key", ["num_experts", "expert_hidden", "num_shared_experts"])
def test_experts(key):
    with pytest.raises(
        UserError,
        match=r"its parameters, with gradients and moments, need .* and this machine has .*; the largest",
    ):
        check(moe={key: 10**9})


def test_width_and_sequences():
    with pytest.raises(UserError, match="model: its parameters, with"):
        check(model={"d_model": 10**9})
    with pytest.raises(UserError, match="micro-batch of 1,000,000,000 x 32 tokens"):
        check(micro_batch=10**9)
    with pytest.raises(UserError, match="micro-batch of 2 x 1,000,000,000 tokens"):
        check(sequence_length=10**9)


def test_what_fits_is_taken():
    check()


def test_a_machine_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.delattr("os.sysconf")
    check(moe={"num_experts": 10**9})


def bytes_of(ranks, backend="torch", **parallelism):
    model, moe = MODEL | {"tie_embeddings": True}, {"num_experts": 4, "expert_hidden": 1000}
    sections = {"model": model | {"moe": moe}, "backend": {"name": backend}, "parallelism": parallelism}
    config = config_from_dict(sections)
    specs = build_model(config.model, config.data, 257).parameter_specs()
    experts = sum(4 * spec.size for spec in specs if spec.is_expert)
    others = sum(4 * spec.size for spec in specs if not spec.is_expert)
    return host_memory.rank_memory(config, specs, 1, ranks), experts, others


def test_a_rank_holds_its_part():
    found, experts, others = bytes_of(4)
    held = found.parameters
    assert held == found.gradients == found.moments / 2 == (experts + others) / 4
    assert bytes_of(4, expert=2)[0].parameters == held
    assert bytes_of(4, expert=2, shard=False)[0].parameters == experts / 2 + others
    divided = bytes_of(4, "mindspore", expert=2)[0]
    assert divided.parameters == divided.gradients == experts / 2 + others
    assert divided.moments == 2 * held
    assert bytes_of(1, expert=4)[0].parameters == experts + others


def test_the_parameters_of_all_ranks_of_a_machine_count(monkeypatch):
    config = config_from_dict({"model": MODEL | {"moe": {"num_experts": 4}}, "parallelism": {"shard": False}})
    specs = build_model(config.model, config.data, 257).parameter_specs()
    need = host_memory.rank_memory(config, specs, 1, 2).held
    monkeypatch.setattr(host_memory, "physical_memory", lambda: 1.5 * need)
    host_memory.check_memory(config, specs, 1, 2, host_memory.Room(1))
    with pytest.raises(
        UserError,
        match=r"its parameters on 2 ranks, with gradients and moments, need .* and this machine has",
    ):
        host_memory.check_memory(config, specs, 1, 2, host_memory.Room(2))


def test_an_accelerator_is_measured_by_its_own_memory(monkeypatch):
    config = config_from_dict({"model": MODEL | {"moe": {"num_experts": 4}}, "backend": {"dtype": "float32"}})
    specs = build_model(config.model, config.data, 257).parameter_specs()
    need = host_memory.rank_memory(config, specs, 1, 1)
    monkeypatch.setattr(host_memory, "physical_memory", lambda: 2.0 * need.program)
    host_memory.check_memory(config, specs, 1, 1, host_memory.Room(8, False, need.held))
    with pytest.raises(UserError, match=r"need .* and the accelerator has .* Choose smaller sizes, or divide"):
        host_memory.check_memory(config, specs, 1, 1, host_memory.Room(8, False, 0.9 * need.held))
    small, large = (host_memory.Room(1, False, share * need.total) for share in (0.9, 1.1))
    assert (small.holds(need), large.holds(need)) == (False, True)
    assert "does not fit the device; 1 rank on this host:" in host_memory.memory_line(need, small)
    crowded = host_memory.Room(8, False, need.total)
    assert not crowded.holds(need)
    assert host_memory.memory_line(need, crowded).endswith("does not fit the host")
    assert "does not say what it has" in host_memory.memory_line(need, host_memory.Room(1, False))
