"""Steps whose results the host does not wait for, as on an accelerator."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeport.backends import get_backend
from moeport.backends.torch import sorting
from moeport.backends.torch.model import TorchTrainingModel
from moeport.backends.torch.ops import DTYPES, TorchOps
from moeport.comm.mesh import single_mesh
from moeport.comm.single import SingleProcess
from moeport.core.parameters import initial_parameters
from moeport.errors import NonFiniteError
from moeport.training.batches import Batches
from moeport.training.pace import Pace
from moeport.training.placed import place_model
from moeport.training.run import train
from moeport.training.task import build_task
from moeport.training.trainer import Trainer
from tests.training.test_diverged import checkpoints, records
from tests.training.test_run import comparable, contents, last
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)
RARELY: dict[str, dict[str, Any]] = {
    "training": {"steps": 7, "evaluation_interval": 0, "skip_steps": ["5"]},
    "checkpoint": {"interval": 0},
    "metrics": {"log_interval": 4, "tensorboard": False, "report": False, "peak_tflops": 1.0},
}


@pytest.fixture
def ahead(monkeypatch):
    """Models on the CPU do as those on an accelerator; returns the steps that were begun before each look."""
    original, looks = TorchTrainingModel.__init__, []

    def init(self, *args):
        original(self, *args)
        self.runs_ahead = True

    collect = Trainer.collect

    def noted(trainer):
        looks.append(trainer.step_number)
        return collect(trainer)

    monkeypatch.setattr(TorchTrainingModel, "__init__", init)
    monkeypatch.setattr(Trainer, "collect", noted)
    monkeypatch.setattr(Pace, "agree", whole_interval(Pace.agree))
    return looks


def whole_interval(agree):
    """However slow the machine, the next look comes after the whole interval."""

    def agreed(pace, wants_to_stop):
        stops = agree(pace, wants_to_stop)
        pace.steps = pace.most
        return stops

    return agreed


def test_a_run_ahead_writes_the_same_metrics_and_weights(tmp_path, monkeypatch, ahead):
    config = tiny_config(tmp_path, **RARELY)
    train(config, console=QUIET)
    assert ahead[:2] == [1, 4], "the first step, then those before the one that is skipped"
    found = [comparable(json.dumps(record)) for record in records(config)], contents(last(config))
    times = [record["step_time"] for record in records(config) if "loss" in record]
    assert times[1] == times[2] == times[3] > 0
    monkeypatch.undo()
    plain = tiny_config(tmp_path, run={"dir": str(tmp_path / "plain")}, **RARELY)
    train(plain, console=QUIET)
    assert found[0] == [comparable(json.dumps(record)) for record in records(plain)]
    assert found[1] == contents(last(plain))


@pytest.mark.parametrize(("poisoned", "saved"), [(3, 0), (4, 3)])
def test_nothing_changes_after_a_loss_that_is_not_finite(tmp_path, monkeypatch, ahead, poisoned, saved):
    """Later steps run before the host looks, and the first one at fault is named."""
    sections = RARELY | {"training": {"steps": 7, "evaluation_interval": 0}, "checkpoint": {"interval": saved}}
    config, advance, models = tiny_config(tmp_path, **sections), Trainer.advance, []

    def poison(trainer, waits=False):
        if trainer.step_number + 1 == poisoned:
            values = trainer.model.parameters()
            values["layers.1.attention.q"][0, 0] = np.nan
            trainer.model.load_parameters(values)
            models.append((trainer.model, values, trainer.model.optimizer_state()))
        advance(trainer, waits)

    monkeypatch.setattr(Trainer, "advance", poison)
    with pytest.raises(NonFiniteError) as error:
        train(config, console=QUIET)
    assert str(error.value).startswith(
        f"step {poisoned}: parameter layers.1.attention.q is not finite (loss nan, gradient norm nan); the parameters "
        "were not updated. Lower"
    )
    assert f"'training.skip_steps=[\"{poisoned}\"]'" in str(error.value)
    assert ahead[-1] > poisoned
    assert [record["step"] for record in records(config)] == list(range(1, poisoned))
    assert checkpoints(config) == ["step-000003"] * bool(saved)
    ((model, values, moments),) = models
    for now, before in ((model.parameters(), values), (model.optimizer_state(), moments)):
        for name, value in before.items():
            np.testing.assert_array_equal(now[name], value, err_msg=name)


class NoWait(TorchDispatchMode):
    """Refuses what an accelerator would have to be waited for."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def of_all_experts(ops, x_RD, w_in, w_out_EDF, counts_E, activation):
    """A grouped_mlp that reads no counts on the host, as those of accelerators."""
    ends_E = counts_E.cumsum(0)
    rows = torch.arange(x_RD.shape[0])
    out = torch.zeros_like(x_RD)
    for expert in range(len(w_in)):
        mine = (rows < ends_E[expert]) & (rows >= ends_E[expert] - counts_E[expert])
        out = torch.where(mine.unsqueeze(1), ops.mlp(x_RD, w_in[expert], w_out_EDF[expert], activation), out)
    return out


def one_hot(ops, ids, n, dtype):
    """As torch.nn.functional.one_hot, which examines the ids on the CPU."""
    return (ids.unsqueeze(-1) == torch.arange(n)).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, dtype):
    kernels = {"dtype": dtype, "kernels": "default"}  # those for CPUs read counts, which costs nothing there
    config = tiny_config(tmp_path, backend=kernels, training={"gradient_accumulation": 2})
    backend, task = get_backend(config.backend), build_task(config, report=lambda _: None)
    monkeypatch.setattr(TorchOps, "grouped_mlp", of_all_experts)
    monkeypatch.setattr(TorchOps, "one_hot", one_hot)
    monkeypatch.setattr(TorchOps, "sort_by_group", lambda ops, group_N, groups: sorting.by_group(group_N, groups))
    shapes, mesh = task.model(), single_mesh(backend.ops)
    params = initial_parameters(shapes.parameter_specs(), 0, task.token_counts)
    placed = place_model(config, backend, shapes, params, mesh)
    placed.arrays.runs_ahead = True
    trainer = Trainer(config, placed, Batches(config.training, shapes, task.train, mesh.world))
    trainer.step()

    def waits(*_):
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch, NoWait():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, waits)
        for _ in range(3):
            trainer.advance()
        with pytest.raises(AssertionError, match="reads a tensor"):
            list(trainer.collect())
    assert [metrics.step for metrics in trainer.collect()] == [2, 3, 4]


def test_looks_come_at_the_interval_or_about_once_a_second():
    clock, pace = [0.0], Pace(SingleProcess(TorchOps(torch.device("cpu"))), 10)

    def run(seconds):
        steps = 0
        while True:
            pace.stepped()
            steps, clock[0] = steps + 1, clock[0] + seconds
            if pace.is_due(False):
                break
        pace.looked()
        pace.agree(False)
        return steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeport.training.pace.time", SimpleNamespace(monotonic=lambda: clock[0]))
        pace._since = 0.0
        assert [run(0.001) for _ in range(6)] == [1, 2, 4, 8, 10, 10]
        assert [run(0.3) for _ in range(3)] == [10, 3, 3]
        assert [run(5.0) for _ in range(2)] == [3, 1]
        pace.steps = 10
        pace.stepped()
        assert pace.is_due(True)
        assert not pace.is_due(False)
