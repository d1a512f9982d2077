"""What a resumed run may change: every key of the config is in the table, and the table is right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moeport.config.keys import keys, subsection, variants
from moeport.errors import ConfigError, UserError
from moeport.training.checkpoint import Checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.resumable import (
    RULES,
    Change,
    Effect,
    announced,
    changes,
    check_resumable,
    rule_of,
    with_former_defaults,
)
from moeport.training.run import train
from moeport.training.run_dir import leaves
from moeport.training.schedule import learning_rate
from tests.training.test_diverged import records
from tests.training.test_run import comparable, contents, last, stop_after
from tests.training.tiny import tiny_config, tiny_values
from tests.training.whole import load_checkpoint

QUIET = Console(quiet=True)
SINGLE = {key.path: key for key in keys() if not (subsection(key.field) or variants(key.field))}


CONSTANT = {"schedule": {"name": "constant", "warmup_steps": 2}}


def checkpoint_of(config, step=3):
    meta = CheckpointMeta(step, 0, None, None, "", config.model_dump(mode="json"), "")
    nothing: Any = {}
    return Checkpoint(Path("run/checkpoints/step-000003"), meta, nothing, nothing)


def test_every_key_has_a_rule_and_every_rule_keys():
    for path in SINGLE:
        assert rule_of(path).why
    used = {id(rule_of(path)) for path in SINGLE}
    assert [name for name, rule in RULES.items() if id(rule) not in used] == []


def test_every_key_is_compared(tmp_path):
    """Whatever its value: with another one, the change is found and does what the table says."""
    config = tiny_config(tmp_path)
    values = leaves(config.model_dump(mode="json"))
    for path in values:
        before = config.model_dump(mode="json")
        section = before
        *parents, name = path.split(".")
        for part in parents:
            section = section[part]
        section[name] = "another value"
        checkpoint = checkpoint_of(config)
        checkpoint = replace(checkpoint, meta=replace(checkpoint.meta, config=before))
        (change,) = changes(config, checkpoint)
        assert (change.key, change.before, change.now) == (path, "another value", values[path])
        if change.effect is Effect.REFUSED:
            with pytest.raises(UserError) as error:
                check_resumable(config, checkpoint)
            assert f"{path}: another value -> {values[path]}; restore these keys" in str(error.value)
        elif path not in ("data.objective.steps", "training.skip_steps", "training.steps"):  # a value of no meaning
            assert check_resumable(config, checkpoint) == [change]


FORMER_DEFAULTS: dict[str, tuple[dict[str, Any], ...]] = {
    "sigmoid_bias": (
        {"top_k": 1},
        {"normalize_gates": True, "num_groups": 1, "top_groups": 1, "bias_update_rate": 1e-3},
        {"normalize_single_gate": True},
    ),
    "sparsity_constrained_expert_choice": (
        {},
        {"mean_experts": 2.0, "group": "sequence", "solver_iterations": 20},
        {"adam_epsilon": 0.01},
    ),
}
"""By router: options of a config, what earlier versions added to it in the checkpoint, and what they computed with."""


@pytest.mark.parametrize("name", FORMER_DEFAULTS)
def test_a_run_of_an_earlier_version_keeps_its_default(tmp_path, name):
    """Unless the config names the new one, which would be another model."""
    given, written, former = FORMER_DEFAULTS[name]

    def config_with(options):
        router = {"name": name, **given, **options}
        return tiny_config(tmp_path, model={"moe": {"router": router, "allow_future_tokens": True}})

    now, old = config_with({}), config_with(written)
    dump = old.model_dump(mode="json")
    for key in former:
        del dump["model"]["moe"]["router"][key]
    checkpoint = checkpoint_of(old)
    checkpoint = replace(checkpoint, meta=replace(checkpoint.meta, config=dump))
    resumed = with_former_defaults(now, checkpoint)
    assert {key: getattr(resumed.model.moe.router, key) for key in former} == former
    assert check_resumable(resumed, checkpoint) == []
    new = {key: value.default for key, value in type(now.model.moe.router).model_fields.items() if key in former}
    with pytest.raises(UserError, match=f"router.{next(iter(former))}"):
        check_resumable(with_former_defaults(config_with(new), checkpoint), checkpoint)


def test_a_run_with_a_former_default_is_resumed_to_the_same_bits(tmp_path):
    router = {"name": "sigmoid_bias", "top_k": 1}
    begun = tiny_config(tmp_path, model={"moe": {"router": router | {"normalize_single_gate": True}}})
    train(begun, console=QUIET)
    want = load_checkpoint(last(begun)).model
    stop_after(begun, 3)
    train(tiny_config(tmp_path, model={"moe": {"router": router}}), resume=True, console=QUIET)
    got = load_checkpoint(last(begun)).model
    assert [name for name, value in want.items() if not np.array_equal(got[name], value)] == []


FREE: dict[str, dict[str, Any]] = {
    "training": {"evaluation_interval": 2, "evaluation_batch_size": 3},
    "checkpoint": {"interval": 2, "keep_last": 1, "keep_best": False},
    "metrics": {"log_interval": 1, "report": True, "peak_tflops": 2.0, "sample_prompt": "x"},
    "data": {"cache_dir": "elsewhere"},
}


def test_keys_that_are_free_change_no_step(tmp_path, capsys):
    config = tiny_config(tmp_path)
    train(config, console=QUIET)
    weights = contents(last(config))
    steps = [comparable(json.dumps(r)) for r in records(config) if "loss" in r]
    stop_after(config, 3)
    free = {name: dict(section) for name, section in FREE.items()}
    free["data"]["cache_dir"] = str(tmp_path / "elsewhere")
    train(tiny_config(tmp_path, **free), resume=True, console=Console(width=300))
    assert contents(last(config)) == weights
    assert [comparable(json.dumps(r)) for r in records(config) if "loss" in r] == steps
    out = capsys.readouterr().out
    for section, values in free.items():
        for name, value in values.items():
            assert rule_of(f"{section}.{name}").effect is Effect.NONE
            assert any(
                line.startswith(f"changed since the checkpoint: {section}.{name}: ") and line.endswith(f"-> {value}")
                for line in out.splitlines()
            ), name


def test_optimiser_schedule_and_length_change_from_here_on(tmp_path, capsys):
    config = tiny_config(tmp_path)
    train(config, console=QUIET)
    before = records(config)
    stop_after(config, 3)
    changed = tiny_config(
        tmp_path,
        training={"steps": 8, "gradient_accumulation": 2},
        optimizer={
            "learning_rate": 0.02,
            "beta1": 0.8,
            "clip_norm": 0.1,
            "schedule": {"name": "wsd", "decay_fraction": 0.5},
        },
    )
    train(changed, resume=True, console=Console(width=300))
    out = capsys.readouterr().out
    for line in (
        "training.steps: 6 -> 8",
        "training.gradient_accumulation: 1 -> 2",
        "optimizer.learning_rate: 0.01 -> 0.02",
        "optimizer.beta1: 0.9 -> 0.8",
        "optimizer.clip_norm: 1.0 -> 0.1",
        "optimizer.schedule.name: cosine -> wsd",
        "optimizer.schedule.decay_fraction: 0.2 -> 0.5",
    ):
        assert f"changed from step 4 on: {line}\n" in out
    steps = {r["step"]: r for r in records(config) if "loss" in r}
    assert list(steps) == list(range(1, 9))
    assert [comparable(json.dumps(r)) for r in records(config)[:3]] == [comparable(json.dumps(r)) for r in before[:3]]
    assert [steps[n]["lr"] for n in range(4, 9)] == [learning_rate(changed.optimizer, n - 1, 8) for n in range(4, 9)]


@pytest.mark.parametrize(("first", "second"), [("float32", "float64"), ("float64", "float32"), ("float32", "bfloat16")])
def test_another_type_holds_from_here_on(tmp_path, first, second):
    def at(dtype, steps):
        training = {"steps": steps, "evaluation_interval": 0}
        return tiny_config(tmp_path, training=training, optimizer=CONSTANT, backend={"dtype": dtype})

    train(at(first, 3), console=QUIET)
    old = load_checkpoint(last(at(first, 3)))
    train(at(second, 4), resume=True, console=QUIET)
    new = load_checkpoint(last(at(second, 4)))
    assert {v.dtype.name for v in new.model.values()} == {"float64" if second == "float64" else "float32"}
    assert {v.dtype for v in new.optimizer.values()} == {v.dtype for v in new.model.values()}
    moved = max(np.abs(new.model[name] - old.model[name]).max() for name in old.model)
    assert 0 < moved < 0.05


@pytest.mark.parametrize(
    ("done", "training", "message"),
    [
        (4, {"steps": 3}, "training.steps: 3 is less than the 4 steps that are done ({path}); expected at least 4, or"),
        (6, {"steps": 5}, "training.steps: 5 is less than the 6 steps that are done ({path}); expected at least 6, or"),
        (
            4,
            {"skip_steps": ["2-5"]},
            "training.skip_steps: of the 4 steps that are done, none were skipped and 2-4 should have been ({path}); "
            "change steps after 4 only, or delete the later checkpoints",
        ),
        (4, {"seed": 1}, "resumed with another model, data or optimiser: training.seed: 0 -> 1; restore"),
        (
            4,
            {"batch_size": 8},
            "data or optimiser: training.batch_size: 4 -> 8; restore these keys, or start another run with",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_touched(tmp_path, done, training, message):
    config = tiny_config(tmp_path)
    train(config, console=QUIET)
    if done < 6:
        stop_after(config, done)
    before = {path: path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        train(tiny_config(tmp_path, training=training), resume=True, console=QUIET)
    assert message.format(path=last(config)) in str(error.value)
    assert {path: path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file()} == before


def test_the_other_optimiser_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    train(config, console=QUIET)
    stop_after(config, 4)
    with pytest.raises(UserError, match=r"model, data or optimiser: optimizer\.name: adamw -> muon; restore"):
        train(tiny_config(tmp_path, optimizer={"name": "muon"}), resume=True, console=QUIET)


def test_steps_that_were_skipped_cannot_be_made_up_for(tmp_path):
    config = tiny_config(tmp_path, training={"skip_steps": ["2-3", "6"]})
    train(config, console=QUIET)
    stop_after(config, 4)
    with pytest.raises(UserError, match=r"of the 4 steps that are done, 2-3 were skipped and none should have been"):
        train(tiny_config(tmp_path), resume=True, console=QUIET)
    train(tiny_config(tmp_path, training={"skip_steps": ["3", "2", "5"]}), resume=True, console=QUIET)
    assert [r["step"] for r in records(config) if "skipped" in r] == [2, 3, 5]


def test_a_finished_run_says_that_changes_have_no_effect(tmp_path, capsys):
    config = tiny_config(tmp_path)
    summary = train(config, console=QUIET)
    before = {path: path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file()}
    changed = tiny_config(tmp_path, optimizer={"learning_rate": 0.5}, checkpoint={"keep_last": 5})
    assert train(changed, resume=True, console=Console(width=300)) == summary
    assert capsys.readouterr().out.splitlines() == [
        f"{config.run.dir} is finished: all 6 steps are done",
        "changed since the checkpoint: checkpoint.keep_last: 10 -> 5",
        "no effect, since all 6 steps are done: optimizer.learning_rate: 0.01 -> 0.5",
    ]
    assert {path: path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file()} == before


def test_a_step_to_profile_that_is_done_has_no_effect():
    change = Change("metrics.profile_step", None, 3)
    assert announced([change], 3, 9) == ["no effect, since step 3 is done: metrics.profile_step: None -> 3"]
    assert announced([change], 2, 9) == ["changed since the checkpoint: metrics.profile_step: None -> 3"]
    assert announced([Change("run.dir", "a", "b")], 2, 9) == []


def test_a_key_that_is_younger_than_the_checkpoint_had_its_default(tmp_path):
    config = tiny_config(tmp_path)
    values = tiny_values(tmp_path)
    assert "skip_steps" not in values["training"]
    assert "encoding" not in values["data"]["source"]
    checkpoint = checkpoint_of(config)
    old = replace(checkpoint, meta=replace(checkpoint.meta, config=values))
    assert check_resumable(config, old) == []
    gone = replace(checkpoint, meta=replace(checkpoint.meta, config=values | {"training": {"gone": 1, "seed": 1}}))
    assert [str(change) for change in changes(config, gone)] == ["training.gone: 1 -> None", "training.seed: 1 -> 0"]


class TestAnotherLength:
    """A run that becomes longer or shorter than planned: what a run planned so from the start is, or refused."""

    @pytest.mark.parametrize(
        ("schedule", "done"),
        [
            ({"name": "constant", "warmup_steps": 2}, 4),
            ({"name": "wsd", "warmup_steps": 1, "decay_fraction": 0.25}, 3),
            ({"name": "cosine", "warmup_steps": 2, "steps": 8}, 4),
            ({"name": "cosine", "warmup_steps": 2}, 2),
        ],
    )
    def test_it_continues_bit_for_bit_where_the_rates_are_the_same(self, tmp_path, schedule, done):
        def of(folder, steps):
            training = {"steps": steps, "evaluation_interval": 0}
            run = {"dir": str(tmp_path / folder)}
            return tiny_config(tmp_path, run=run, training=training, optimizer={"schedule": schedule})

        train(of("short", 4), console=QUIET)
        stop_after(of("short", 4), done)
        train(of("short", 8), resume=True, console=QUIET)
        train(of("long", 8), console=QUIET)
        assert contents(last(of("short", 8))) == contents(last(of("long", 8)))

    @pytest.mark.parametrize(
        ("schedule", "before", "now", "done", "ways"),
        [
            ({"name": "cosine"}, 400, 1000, 400, "to let the rate jump, --set optimizer.schedule.steps=1000; to start"),
            (
                {"name": "cosine"},
                400,
                200,
                100,
                "to keep the rates that were planned, --set optimizer.schedule.steps=400;",
            ),
            ({"name": "cosine", "final_fraction": 0.1}, 4, 9, 4, "to keep the rates that were planned, --set"),
            (
                {"name": "wsd"},
                400,
                1000,
                400,
                "to continue from before the decay, delete the checkpoints after step 320;",
            ),
        ],
    )
    def test_it_is_refused_where_the_rate_would_jump(self, tmp_path, schedule, before, now, done, ways):
        def of(length, **more):
            return tiny_config(tmp_path, training={"steps": length}, optimizer={"schedule": {**schedule, **more}})

        checkpoint = checkpoint_of(of(before), done)
        with pytest.raises(UserError) as error:
            check_resumable(of(now), checkpoint)
        was = learning_rate(of(before).optimizer, done - 1, before)
        message = str(error.value)
        assert message.startswith(
            f"training.steps: {before} -> {now}: the {schedule['name']} schedule of {before} steps has the learning "
            f"rate {was:.3g} in step {done}, the last one done, and one of {now} steps would have had "
        )
        assert ways in message
        for way in (before, now) if "steps=400" in ways or "final_fraction" in schedule else (now,):
            assert check_resumable(of(now, steps=way), checkpoint)

    def test_a_schedule_of_its_own_length_ends_where_it_ends(self, tmp_path):
        schedule = {"name": "cosine", "warmup_steps": 2, "steps": 6, "final_fraction": 0.5}
        optimizer = tiny_config(tmp_path, optimizer={"schedule": schedule}).optimizer
        rates = [learning_rate(optimizer, step, 10) for step in range(10)]
        assert rates[:6] == [learning_rate(optimizer, step, 6) for step in range(6)]
        assert rates[6:] == [0.005] * 4
        with pytest.raises(
            ConfigError, match=r"the learning rate is 0 in all steps of training\.steps = 10 after these"
        ):
            tiny_config(
                tmp_path,
                training={"steps": 10},
                optimizer={"schedule": {"name": "cosine", "warmup_steps": 2, "steps": 6}},
            )
