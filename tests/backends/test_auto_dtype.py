"""What `backend.dtype: auto` chooses with PyTorch, and that it is measured once."""

import json

import pytest
import torch

from moeport.backends import get_backend
from moeport.backends.torch import auto_dtype, backend
from moeport.backends.torch.auto_dtype import choose_dtype
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.core.ops import FLOAT_DTYPES
from moeport.launch.launcher import Launch
from moeport.launch.machine import Processor

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
