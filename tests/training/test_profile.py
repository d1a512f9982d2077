"""`moeport train --profile`: which steps are profiled, and what is written of them."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moeport.config import resolved_yaml
from moeport.core.parts import KINDS
from moeport.errors import InterruptedRunError, UserError
from moeport.training.loop import _Loop
from moeport.training.metrics import read_metrics
from moeport.training.profile import Window, steps_to_profile
from moeport.training.run import train
from moeport.training.trainer import Trainer
from tests.comm.jobs import ROOT, start
from tests.training.tiny import tiny_config

torch = pytest.importorskip("torch")

from moeport.backends.torch.profiling.session import TorchProfiler  # noqa: E402

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("metrics", "done", "steps", "expected"),
    [
        ({}, 0, 100, range(0)),
        ({"profile": True}, 0, 100, range(6, 9)),
        ({"profile": True}, 40, 100, range(46, 49)),
        ({"profile": True}, 0, 4, range(2, 5)),
        ({"profile": True}, 0, 2, range(1, 3)),
        ({"profile": True, "profile_start": 10, "profile_steps": 2}, 0, 100, range(10, 12)),
        ({"profile": True, "profile_start": 99}, 0, 100, range(99, 101)),
        ({"profile": True, "profile_start": 10, "profile_steps": 5}, 11, 100, range(12, 15)),
        ({"profile": True, "profile_start": 10}, 50, 100, range(0)),
        ({"profile_step": 7}, 0, 100, range(7, 8)),
    ],
)
def test_which_steps_are_timed(tmp_path, metrics, done, steps, expected):
    config = tiny_config(tmp_path, metrics=metrics, training={"steps": steps})
    assert list(steps_to_profile(config, done)) == list(expected)


def profile_of(folder):
    return json.loads((folder / "run" / "profile" / "profile.json").read_text())


def traces(folder):
    return sorted(path.name for path in (folder / "run" / "profile").glob("*.gz"))


FEW = {"training": {"steps": 4, "evaluation_interval": 0}, "checkpoint": {"interval": 0}}


def test_a_profile_is_written_reported_and_marked_and_changes_no_result(tmp_path, capsys):
    metrics = {"profile": True, "profile_start": 4, "profile_steps": 2, "report": True}
    summary = train(tiny_config(tmp_path, metrics=metrics), console=Console(width=100))
    printed = capsys.readouterr().out
    assert "Where a step's time goes: steps 4 to 5" in printed
    assert "expert products" in printed
    assert "bytes per token" in printed
    profile = profile_of(tmp_path)
    assert (profile["steps"], profile["ranks"], profile["clock"]) == ([4, 5], 1, "cpu")
    assert set(profile["kinds"]) == set(KINDS)
    total = sum(kind["mean"] for kind in profile["kinds"].values())
    assert total == pytest.approx(profile["step_seconds"]["mean"], rel=1e-6)
    assert sum(kind["share"] for kind in profile["kinds"].values()) == pytest.approx(1)
    assert profile["memory"]["planned"]["parameters"] == profile["memory"]["parameters"]["mean"]
    assert traces(tmp_path) == ["steps-4-5-rank-0.json.gz"]
    steps, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step.profiled for step in steps] == [0, 0, 1, 1, 1, 0]  # the third one's memory was measured
    speeds = sorted(step.tokens_per_second for step in steps if not step.profiled)
    assert summary.tokens_per_second == speeds[1]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "profiled" not in first
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Where a step's time goes" in page
    assert "Memory of a step" in page
    train(tiny_config(tmp_path / "plain"), console=QUIET)
    plain, _ = read_metrics(tmp_path / "plain" / "run" / "metrics.jsonl")
    assert [step.loss for step in steps] == [step.loss for step in plain]


def test_a_run_that_is_interrupted_in_the_window_leaves_what_it_has(tmp_path, monkeypatch):
    metrics = {"profile": True, "profile_start": 2, "profile_steps": 2}
    monkeypatch.setattr(_Loop, "_any_rank_stops", lambda loop: loop.run.trainer.step_number == 2)
    config = tiny_config(tmp_path, metrics=metrics, **FEW)
    with pytest.raises(InterruptedRunError):
        train(config, console=QUIET)
    assert profile_of(tmp_path)["steps"] == [2, 2]
    monkeypatch.undo()
    train(config, resume=True, console=QUIET)
    assert profile_of(tmp_path)["steps"] == [3, 3]
    assert traces(tmp_path) == ["steps-2-2-rank-0.json.gz", "steps-3-3-rank-0.json.gz"]


def failing_at(step, monkeypatch):
    advance = Trainer.step

    def run(trainer):
        if trainer.step_number == step - 1:
            raise RuntimeError("broken")
        return advance(trainer)

    monkeypatch.setattr(Trainer, "step", run)


@pytest.mark.parametrize("step", [2, 3])
def test_an_error_in_the_window_leaves_the_trace_and_no_mark(tmp_path, monkeypatch, step):
    """Also in its first step: the profiler has ended, and operations are as they were."""
    failing_at(step, monkeypatch)
    metrics = {"profile": True, "profile_start": 2, "profile_steps": 2}
    with pytest.raises(RuntimeError, match="broken"):
        train(tiny_config(tmp_path, metrics=metrics, **FEW), console=QUIET)
    assert traces(tmp_path) == [f"steps-2-{step}-rank-0.json.gz"]
    assert not (tmp_path / "run" / "profile" / "profile.json").exists()
    assert not torch.autograd._profiler_enabled()


def test_a_profile_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise UserError("the disk is full")

    failing_at(2, monkeypatch)
    monkeypatch.setattr(TorchProfiler, "finish", full)
    with pytest.raises(RuntimeError, match="broken"):
        train(tiny_config(tmp_path, metrics={"profile_step": 2}, **FEW), console=Console(width=100))
    assert "the profile could not be written: the disk is full" in capsys.readouterr().out


def test_a_profile_behind_the_end_is_said_to_be_none(tmp_path, capsys):
    metrics = {"profile": True, "profile_start": 9}
    run: Any = SimpleNamespace(config=tiny_config(tmp_path, metrics=metrics), start_step=0, is_first=True)
    with Window(run, Console()):
        pass
    assert capsys.readouterr().out == "nothing will be profiled: the profile begins at step 9, the run ends at 6\n"


def test_ranks_write_a_trace_each_and_are_compared(tmp_path):
    config = tiny_config(
        tmp_path,
        metrics={"profile_steps": 1},
        training={"steps": 2, "batch_size": 4, "evaluation_interval": 0},
        checkpoint={"interval": 0},
        parallelism={"expert": 2},
    )
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    script, where = str(ROOT / "tests/training/ranks_cli.py"), tmp_path / "job"
    job = start("torch", 2, [script, str(where), "train", str(tmp_path / "config.yaml"), "--profile"], where)
    try:
        assert (job.wait(200), job.left()) == (0, []), job.output()[-3000:]
    finally:
        job.end()
    profile = profile_of(tmp_path)
    assert (profile["ranks"], len(traces(tmp_path))) == (2, 2)
    communication = profile["kinds"]["communication"]
    assert 0 < communication["min"] <= communication["mean"] <= communication["max"]
    assert profile["kinds"]["other"]["share"] < 0.1
    total = sum(kind["mean"] for kind in profile["kinds"].values())
    assert total == pytest.approx(profile["step_seconds"]["mean"], rel=1e-6)
