"""Runs that diverge: what ends them, what is kept, and the way past a batch."""

import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from moeport.config import load_config
from moeport.errors import CheckpointError, ConfigError, NonFiniteError
from moeport.training.checkpoint import list_checkpoints, save_checkpoint
from moeport.training.evaluate import Evaluation
from moeport.training.generate import generate
from moeport.training.run import train
from moeport.training.task import TextTask
from moeport.training.trainer import Trainer
from tests.training.test_run import comparable, contents, last, stop_after
from tests.training.tiny import tiny_config
from tests.training.whole import load_checkpoint

QUIET = Console(quiet=True)
WAY_ON = "Lower optimizer.learning_rate or lengthen optimizer.schedule.warmup_steps and "


def checkpoints(config):
    return [path.name for path in list_checkpoints(config.run.dir / "checkpoints")]


def records(config):
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def after_step(monkeypatch, step, change):
    """Calls `change(model)` once `step` is done."""
    original = Trainer.advance

    def changed(trainer):
        original(trainer)
        if trainer.step_number == step:
            change(trainer.model)

    monkeypatch.setattr(Trainer, "advance", changed)


def poison(name, value):
    """Puts `value` into one entry of a parameter or of a moment."""

    def change(model):
        if name.startswith("exp_avg"):
            state = model.optimizer_state()
            state[name].flat[-1] = value
            model.load_optimizer_state(state, 4)
        else:
            arrays = model.parameters([name])
            arrays[name].flat[-1] = value
            model.load_parameters(arrays)

    return change


@pytest.mark.parametrize(
    ("backend", "name", "value"),
    [
        ("torch", "embedding.weight", math.nan),
        ("torch", "layers.1.moe.router.bias", math.inf),
        ("torch", "exp_avg.embedding.weight", math.nan),
        ("torch", "exp_avg_sq.final_norm.weight", math.inf),
        pytest.param("mindspore", "embedding.weight", math.nan, marks=pytest.mark.slow),
        pytest.param("mindspore", "exp_avg_sq.embedding.weight", math.inf, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_is_not_saved_even_where_no_loss_shows_it(tmp_path, monkeypatch, backend, name, value):
    """The last row of the embedding belongs to no byte of the text."""
    pytest.importorskip(backend)
    config = tiny_config(
        tmp_path,
        backend={"name": backend},
        model={"vocab_size": 300, "moe": {"router": {"name": "sigmoid_bias"}}},
        training={"evaluation_interval": 0},
        checkpoint={"interval": 2},
    )
    after_step(monkeypatch, 4, poison(name, value))
    with pytest.raises(NonFiniteError) as error:
        train(config, console=QUIET)
    assert str(error.value) == (
        f"step 4: {name} is not finite, and nothing of this step was saved. {WAY_ON}continue from step-000002, the "
        "last good checkpoint, with --resume; if only this batch is at fault, skip it with "
        "--set 'training.skip_steps=[\"4\"]'"
    )
    assert checkpoints(config) == ["step-000002"]
    assert not list(config.run.dir.glob("checkpoints/.*"))
    monkeypatch.undo()
    train(config, resume=True, console=QUIET)
    assert checkpoints(config) == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.parametrize(("step", "loss"), [(2, math.nan), (6, math.inf)])
def test_an_evaluation_that_is_not_finite_is_neither_best_nor_saved(tmp_path, monkeypatch, step, loss):
    config = tiny_config(tmp_path, training={"evaluation_interval": 1}, checkpoint={"interval": 0, "keep_last": 10})
    original, count = TextTask.evaluate, 0

    def evaluate(task, world, model, size):
        nonlocal count
        count += 1
        return Evaluation(loss, loss) if count == step else original(task, world, model, size)

    monkeypatch.setattr(TextTask, "evaluate", evaluate)
    with pytest.raises(NonFiniteError) as error:
        train(config, console=QUIET)
    assert str(error.value).startswith(
        f"step {step}: the validation loss after it is {loss}, and nothing of this step was saved. {WAY_ON}"
        f"continue from step-{step - 1:06d}, the last good checkpoint, with --resume"
    )
    assert checkpoints(config)[-1] == f"step-{step - 1:06d}"
    assert records(config)[-1] == {"step": step, "val_loss": None, "val_bits_per_byte": None}
    assert not (config.run.dir / "summary.json").exists()
    monkeypatch.undo()
    train(config, resume=True, console=QUIET)
    assert [(r["step"], r["val_loss"] is None) for r in records(config) if "val_loss" in r] == [
        (step, False) for step in range(1, 7)
    ]


def test_a_run_that_diverges_in_its_only_step_ends_with_a_sentence(tmp_path):
    config = tiny_config(
        tmp_path,
        training={"steps": 1},
        optimizer={"learning_rate": 1e38, "weight_decay": 0.0, "schedule": {"name": "constant", "warmup_steps": 0}},
    )
    with pytest.raises(NonFiniteError) as error:
        train(config, console=QUIET)
    assert re.match(
        r"step 1: the validation loss after it is nan, since parameter \S+ is not finite, ", str(error.value)
    )
    assert f"{WAY_ON}start from step 1 with --resume" in str(error.value)
    assert checkpoints(config) == []
    better = tiny_config(tmp_path, training={"steps": 2})
    assert train(better, resume=True, console=QUIET).steps == 2


def test_a_checkpoint_of_an_older_moeport_that_diverged_is_refused(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 2})
    train(config, console=QUIET)
    checkpoint = load_checkpoint(last(config))
    checkpoint.model["embedding.weight"].flat[-1] = math.nan
    save_checkpoint(last(config).parent, checkpoint.meta, checkpoint.model, checkpoint.optimizer)
    longer = tiny_config(tmp_path, training={"steps": 4})
    with pytest.raises(CheckpointError, match=r"step-000002: embedding\.weight holds a NaN or an infinity: the run "):
        train(longer, resume=True, console=QUIET)
    with pytest.raises(CheckpointError, match=r"step-000002: embedding\.weight holds a NaN or an infinity: the run "):
        generate(config.run.dir, "x")


SKIPPING = {"steps": 6, "evaluation_interval": 3, "skip_steps": ["2", "4-5"]}


def test_skipped_steps_are_stated_and_change_nothing_else(tmp_path, capsys):
    plain = tiny_config(tmp_path, run={"dir": str(tmp_path / "plain")})
    train(plain, console=QUIET)
    config = tiny_config(tmp_path, training=SKIPPING)
    train(config, console=Console(width=200))
    out = capsys.readouterr().out
    assert "skipping    steps 2, 4-5, as training.skip_steps says" in out
    assert [line for line in out.splitlines() if "  skipped: " in line] == [
        f"step: {step}/6  skipped: as training.skip_steps says" for step in (2, 4, 5)
    ]
    found = records(config)
    assert [r for r in found if "skipped" in r] == [{"step": step, "skipped": True} for step in (2, 4, 5)]
    steps, of_plain = ({r["step"]: r for r in rs if "loss" in r} for rs in (found, records(plain)))
    assert list(steps) == [1, 3, 6]
    assert {step: r["tokens"] for step, r in steps.items()} == {1: 128, 3: 256, 6: 384}
    assert all(steps[step]["lr"] == of_plain[step]["lr"] for step in steps), "the schedule goes on"
    assert steps[1]["loss"] == of_plain[1]["loss"]
    assert steps[3]["loss"] != of_plain[3]["loss"]
    assert [r["step"] for r in found if "val_loss" in r] == [3, 6]
    assert load_checkpoint(last(config)).meta.tokens == 3 * 128


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=pytest.mark.slow)])
def test_a_run_with_skipped_steps_resumes_bit_for_bit_at_each_of_its_steps(tmp_path, backend):
    pytest.importorskip(backend)
    config = tiny_config(tmp_path, backend={"name": backend}, training=SKIPPING | {"skip_steps": ["1-2", "4"]})
    train(config, console=QUIET)
    weights, whole = contents(last(config)), [comparable(json.dumps(r)) for r in records(config)]
    for step in (5, 2) if backend == "torch" else (2,):
        stop_after(config, step)
        train(config, resume=True, console=QUIET)
        assert contents(last(config)) == weights
        assert [comparable(json.dumps(r)) for r in records(config)] == whole


def test_a_run_goes_on_past_the_batch_at_which_it_diverged(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, training={"evaluation_interval": 0})
    original = Trainer.advance

    def diverging(trainer):
        if trainer.step_number + 1 == 4:
            raise NonFiniteError("step 4: loss is not finite")
        original(trainer)

    monkeypatch.setattr(Trainer, "advance", diverging)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"skip it with --set 'training\.skip_steps=\[\"4\"\]'"):
            train(config, resume=True, console=QUIET)
    passed = tiny_config(tmp_path, training={"evaluation_interval": 0, "skip_steps": ["4"]})
    assert train(passed, resume=True, console=QUIET).steps == 6
    assert np.diff([r["step"] for r in records(config)]).tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[125-120]", "'125-120' is not a range of steps (got [125-120]); expected steps counted from 1, and ranges"),
        ('["0"]', "'0' is not a range of steps"),
        ("[a]", "'a' is not a range of steps"),
        ('["1--2"]', "'1--2' is not a range of steps"),
        ('["1-1000"]', "leaves no step to train on with training.steps = 1000"),
        ('["1-500", "500-2000"]', "leaves no step to train on with training.steps = 1000"),
        ("[120]", 'training.skip_steps[0]: is an integer (got 120); expected a string; did you mean "120"?'),
        ("120-125", "is a string (got 120-125); expected a list of strings"),
    ],
)
def test_ranges_of_steps_that_cannot_be_are_refused(value, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"training.skip_steps={value}"])
    assert message in str(error.value)


def test_ranges_of_steps_are_merged():
    training = load_config(None, ['training.skip_steps=["7", "120-125", "6", "124-130", "9"]']).training
    assert training.skipped == ((6, 7), (9, 9), (120, 130))
    assert [step for step in range(1, 140) if training.skips(step)] == [6, 7, 9, *range(120, 131)]
    assert [training.updates(step) for step in (5, 6, 7, 8, 122, 500)] == [5, 5, 5, 6, 116, 486]
