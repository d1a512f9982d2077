"""The validation loss on rare and on frequent ids."""

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moeport.config.schema import Config
from moeport.training.evaluate import losses_by_frequency
from moeport.training.metrics import read_metrics
from moeport.training.run import train
from moeport.training.task import build_task
from tests.training.tiny import tiny_config


class ById:
    """A model whose loss on id i is i / 100, whatever it reads."""

    def token_losses(self, batch):
        return batch.target_BS / 100


class One:
    """A single rank."""

    rank, size = 0, 1

    def sum_of_numbers(self, numbers):
        return numbers


MODEL: Any = ById()
WORLD: Any = One()


def test_targets_count_by_their_own_frequency():
    batches = [(0, (np.array([[1, 2, 3]]), np.array([[2, 3, 1]]))), (0, (np.array([[1, 2]]), np.array([[2, 4]])))]
    frequent_V = np.array([False, True, True, False, False])
    found = losses_by_frequency(WORLD, MODEL, batches, frequent_V)
    assert found == pytest.approx({"rare": (0.03 + 0.04) / 2, "frequent": (0.02 + 0.01 + 0.02) / 3})
    assert list(losses_by_frequency(WORLD, MODEL, batches, np.ones(5, bool))) == ["frequent"]


def config_of(folder, backend="torch", router="topk") -> Config:
    return tiny_config(
        folder,
        model={"moe": {"router": {"name": router}}},
        training={"steps": 2},
        metrics={"loss_by_frequency": True},
        backend={"name": backend, "device": "cpu"},
    )


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("mindspore", marks=[pytest.mark.mindspore, pytest.mark.slow])]
)
def test_a_run_writes_it_once_and_it_adds_up(tmp_path, backend):
    pytest.importorskip(backend)
    config = config_of(tmp_path, backend)
    train(config, console=Console(quiet=True))
    _, evaluations = read_metrics(config.run.dir / "metrics.jsonl")
    (last,) = (each for each in evaluations if each.val_loss_by_frequency)
    assert last is evaluations[-1]
    task = build_task(config, report=lambda text: None)
    counts_V = task.train.token_counts()
    order = sorted(range(len(counts_V)), key=lambda i: (-counts_V[i], i))
    frequent, covered = set(), 0
    for token in order:
        if covered >= 0.8 * counts_V.sum():
            break
        frequent.add(token)
        covered += counts_V[token]
    targets = np.concatenate([target_BS.ravel() for _, target_BS in task.validation.windows(1)])
    number = sum(target in frequent for target in targets.tolist())
    parts = last.val_loss_by_frequency
    whole = (parts["frequent"] * number + parts["rare"] * (len(targets) - number)) / len(targets)
    assert whole == pytest.approx(last.val_loss, rel=1e-5)
    assert parts["rare"] > parts["frequent"]
