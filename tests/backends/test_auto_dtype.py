"""What `backend.dtype: auto` chooses with PyTorch, and that it is measured once."""

import json

import pytest
import torch

from moeport.backends import get_backend
from moeport.backends.examine import TINY, VOCAB_SIZE
from moeport.backends.torch import auto_dtype, backend, step_trial
from moeport.backends.torch.auto_dtype import choose_dtype
from moeport.backends.torch.fused import operations
from moeport.comm.single import SingleProcess
from moeport.config import config_from_dict
from moeport.config.training import BackendConfig
from moeport.core.ops import FLOAT_DTYPES
from moeport.launch.launcher import Launch
from moeport.launch.machine import Processor
from moeport.model.decoder import DecoderLM
from moeport.model.planned import Planned
from moeport.training.prepare import planned as expected

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends a machine; returns the types that were measured on it so far."""
    measured = []

    def pretend(speedup=2.0, units=True, model="a processor", threads=2):
        def speed(device, dtype, seconds):
            measured.append(dtype)
            return 100.0 * (speedup if dtype == torch.bfloat16 else 1.0)

        monkeypatch.setattr(auto_dtype, "matmul_flops_per_second", speed)
        monkeypatch.setattr(auto_dtype, "processor", lambda: Processor(model, units))
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return measured

    return pretend


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_a_named_type_is_used_as_it_is(name, machine):
    measured = machine()
    assert get_backend(BackendConfig(name="torch", device="cpu", dtype=name)).dtype == name
    assert not measured


@pytest.mark.parametrize("units", [True, None])
@pytest.mark.parametrize(("speedup", "chosen"), [(0.5, "float32"), (1.2, "float32"), (1.4, "bfloat16")])
def test_auto_takes_bfloat16_where_it_is_measurably_faster(machine, speedup, chosen, units):
    machine(speedup, units)
    assert choose_dtype(CPU) == chosen


def test_a_processor_without_bfloat16_units_is_not_made_to_emulate_them(machine):
    measured = machine(2.0, units=False)
    assert choose_dtype(CPU) == "float32"
    assert not measured


def test_one_measurement_serves_all_later_runs_on_machines_of_the_kind(machine, monkeypatch):
    measured = machine(2.0)
    assert [choose_dtype(CPU) for _ in range(3)] == ["bfloat16"] * 3
    assert len(measured) == 2
    machine(0.5, model="another")
    assert choose_dtype(CPU) == "float32"
    assert len(measured) == 4
    machine(0.5, threads=3)
    assert choose_dtype(CPU) == "float32"
    assert len(measured) == 6
    machine(0.5)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert choose_dtype(CPU) == "float32"
    assert len(measured) == 8


@pytest.mark.parametrize("text", ["", "{", "[]", '"bfloat16"', "KEY float16", "KEY 7", "OTHER float32"])
def test_a_damaged_cache_is_measured_again(machine, tmp_path, text):
    measured = machine(2.0)
    choose_dtype(CPU)
    (file,) = (tmp_path / "cache").rglob("*.json")
    kept = json.loads(file.read_text())
    kind, _, dtype = text.partition(" ")
    if dtype:
        text = json.dumps({"key": kept["key"] if kind == "KEY" else {}, "dtype": dtype})
    file.write_text(text)
    assert choose_dtype(CPU) == "bfloat16"
    assert len(measured) == 4
    assert json.loads(file.read_text()) == kept


def test_a_cache_that_cannot_be_written_costs_a_measurement(machine, tmp_path):
    measured = machine(2.0)
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert [choose_dtype(CPU) for _ in range(2)] == ["bfloat16"] * 2
    assert len(measured) == 4


def planned(batch_size=2):
    lm = DecoderLM(TINY, VOCAB_SIZE)
    return Planned(lm, batch_size, 8)


@pytest.mark.parametrize(("steps", "chosen"), [(0.9, "float32"), (1.1, "float32"), (1.3, "bfloat16")])
def test_a_small_model_must_take_its_steps_faster(machine, monkeypatch, steps, chosen):
    machine(2.0)
    trials = []

    def speedup(planned, ops):
        trials.append(planned)
        return steps

    monkeypatch.setattr(step_trial, "is_small", lambda planned, rate: True)
    monkeypatch.setattr(step_trial, "speedup", speedup)
    assert [choose_dtype(CPU, planned()) for _ in range(2)] == [chosen] * 2
    assert choose_dtype(CPU) == "bfloat16", "nothing is known of a model"
    assert len(trials) == 1
    choose_dtype(CPU, planned(batch_size=4))
    assert len(trials) == 2, "other steps take another time"


@pytest.mark.parametrize(("rate", "small"), [(1e12, True), (1e3, False)])
def test_steps_of_a_large_model_are_not_timed(machine, monkeypatch, rate, small):
    machine(2.0)
    assert step_trial.is_small(planned(), rate) is small
    monkeypatch.setattr(step_trial, "is_small", lambda planned, rate: False)
    monkeypatch.setattr(step_trial, "speedup", lambda planned, ops: pytest.fail("was timed"))
    assert choose_dtype(CPU, planned()) == "bfloat16"


def test_steps_are_timed_with_the_model_itself():
    state = torch.get_rng_state()
    assert 0 < step_trial.speedup(planned(), operations(CPU)) < 1e3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_says_what_it_will_train():
    config = config_from_dict(
        {"training": {"batch_size": 8, "gradient_accumulation": 2}, "data": {"sequence_length": 32}}
    )
    found = expected(config, ranks=2)
    assert (found.batch_size, found.sequence_length) == (2, 32)
    assert isinstance(found.model, DecoderLM)
    assert found.model.vocab_size == 4096


class World(SingleProcess):
    """A rank of a job whose rank 0 has chosen a type."""

    def __init__(self, ops, rank, chosen):
        super().__init__(ops)
        self.size, self.rank, self.chosen = 2, rank, chosen

    def broadcast(self, x, source):
        return x if self.rank == 0 else torch.tensor([FLOAT_DTYPES.index(self.chosen)])


@pytest.mark.parametrize(
    ("asked", "rank", "found"), [("auto", 1, "float32"), ("auto", 0, "bfloat16"), ("float64", 1, "float64")]
)
def test_rank_0_chooses_for_all(machine, monkeypatch, asked, rank, found):
    measured = machine(2.0)
    monkeypatch.setattr(backend, "start", lambda ops, launch, timeout, job: World(ops, launch.rank, "float32"))
    torch_backend = get_backend(BackendConfig(name="torch", device="cpu", dtype=asked))
    torch_backend.communicator(Launch("torchrun", rank, 2, rank, "127.0.0.1", 1))
    assert torch_backend.dtype == found
    assert bool(measured) == (asked == "auto" and rank == 0)
