"""Batches that a thread draws ahead."""

import json
import threading
import time
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("torch")

from moeport.errors import DataError
from moeport.training import ahead
from moeport.training.ahead import STEPS_AHEAD, DrawnAhead
from moeport.training.batches import Batches
from moeport.training.run import train
from tests.training.test_diverged import records
from tests.training.test_run import comparable, contents, last, stop_after
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)
RANDOM: dict[str, dict[str, Any]] = {
    "model": {"moe": {"router": {"name": "gshard"}}},
    "training": {"steps": 6, "skip_steps": ["2", "5"]},
}


@pytest.fixture
def drawn(monkeypatch):
    """Training draws ahead on the CPU too; returns the steps that were drawn, each with the name of its thread."""
    original, steps = Batches.of_step, []

    def of_step(batches, step):
        steps.append((step, threading.current_thread().name))
        return original(batches, step)

    monkeypatch.setattr(Batches, "of_step", of_step)
    monkeypatch.setattr(ahead, "pays_off", lambda device, cores: True)
    return steps


def result(config):
    return [comparable(json.dumps(record)) for record in records(config)], contents(last(config))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_training_is_the_same_with_batches_drawn_ahead(tmp_path, monkeypatch, drawn):
    config = tiny_config(tmp_path, **RANDOM)
    train(config, console=QUIET)
    assert drawn == [(step, "batches") for step in (0, 2, 3, 5)]
    found = result(config)
    stop_after(config, 3)
    drawn.clear()
    train(config, resume=True, console=QUIET)
    assert drawn == [(step, "batches") for step in (3, 5)]
    assert result(config) == found
    assert not threads()
    monkeypatch.undo()
    plain = tiny_config(tmp_path, run={"dir": str(tmp_path / "plain")}, **RANDOM)
    train(plain, console=QUIET)
    assert result(plain) == found


def test_an_error_in_drawing_ends_training_at_its_step(tmp_path, monkeypatch, drawn):
    of_step = Batches.of_step

    def broken(batches, step):
        if step == 3:
            raise DataError("text.txt: cannot be read")
        return of_step(batches, step)

    monkeypatch.setattr(Batches, "of_step", broken)
    config = tiny_config(tmp_path)
    with pytest.raises(DataError, match=r"^text\.txt: cannot be read$"):
        train(config, console=QUIET)
    assert [record["step"] for record in records(config) if "loss" in record] == [1, 2, 3]
    assert not threads()


def test_few_steps_are_drawn_ahead_and_none_after_the_end():
    asked = []

    def draw(step):
        asked.append(step)
        return [step]

    with DrawnAhead(draw, range(100)) as batches:
        assert [batches(step) for step in range(3)] == [[0], [1], [2]]
        end = time.monotonic() + 20
        while len(asked) < 3 + STEPS_AHEAD and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        assert asked == list(range(3 + STEPS_AHEAD))
    assert not threads()
    assert len(asked) == 3 + STEPS_AHEAD


@pytest.mark.parametrize(
    ("device", "cores", "pays"),
    [
        ("cpu (2 threads)", 2, False),
        ("cuda (NVIDIA H100)", 1, False),
        ("cuda (NVIDIA H100)", 2, True),
        ("npu (910)", 8, True),
    ],
)
def test_a_thread_draws_only_where_the_host_is_idle(device, cores, pays):
    assert ahead.pays_off(device, cores) == pays
