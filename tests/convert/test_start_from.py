"""Runs that start from the weights of another, such as a converted one."""

import numpy as np
import pytest
from rich.console import Console

from moeport.errors import UserError
from moeport.training.run import train
from tests.training.tiny import tiny_config
from tests.training.whole import load_checkpoint


def run(folder, name, resume=False, start=None, steps=2, **sections):
    where = {"run": {"dir": str(folder / name)}}
    training = {"steps": steps, "evaluation_interval": 0, "start_from": None if start is None else str(start)}
    return train(
        tiny_config(folder, **where, training=training, **sections), resume=resume, console=Console(quiet=True)
    )


def weights(folder, name, step):
    return load_checkpoint(folder / name / "checkpoints" / f"step-{step:06d}").model


def test_a_run_begins_where_another_ended(tmp_path):
    run(tmp_path, "first", steps=3)
    small = {"learning_rate": 1e-30, "weight_decay": 0.0}
    run(tmp_path, "second", start=tmp_path / "first", steps=1, optimizer=small)
    run(tmp_path, "third", start=tmp_path / "first/checkpoints/step-000001", steps=1, optimizer=small)
    for name, step in (("second", 3), ("third", 1)):
        got, want = weights(tmp_path, name, 1), weights(tmp_path, "first", step)
        assert all(np.array_equal(got[key], want[key]) for key in want)
    assert any((weights(tmp_path, "second", 1)[key] != weights(tmp_path, "third", 1)[key]).any() for key in want)


def test_a_resumed_run_does_not_start_again(tmp_path):
    run(tmp_path, "first")
    run(tmp_path, "second", start=tmp_path / "first")
    before = weights(tmp_path, "second", 2)
    run(tmp_path, "second", resume=True, start=tmp_path / "moved", steps=3)
    assert all(np.array_equal(weights(tmp_path, "second", 2)[key], value) for key, value in before.items())


def test_what_cannot_be_started_from(tmp_path):
    with pytest.raises(UserError, match=r"training\.start_from: .*missing is no run folder and no checkpoint"):
        run(tmp_path, "second", start=tmp_path / "missing")
    run(tmp_path, "first")
    with pytest.raises(UserError, match=r"does not fit the model of the config: .*w_in: shape"):
        run(tmp_path, "third", start=tmp_path / "first", model={"moe": {"expert_hidden": 8}})
    with pytest.raises(UserError, match=r"training\.start_from: .* has another tokenizer than data\.tokenizer gives"):
        run(
            tmp_path,
            "fourth",
            start=tmp_path / "first",
            model={"vocab_size": 257},
            data={"tokenizer": {"name": "bpe", "vocab_size": 257}},
        )
