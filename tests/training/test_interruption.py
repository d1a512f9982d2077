"""Runs that are stopped, by signals in processes of their own."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from rich.console import Console

from moeport.cli.main import main
from moeport.config import load_config
from moeport.training.checkpoint import list_checkpoints
from moeport.training.run import train
from tests.faults.runs import NOTHING, Try
from tests.training.tiny import tiny_values

STEPS = 30


def write_config(folder, name):
    values = tiny_values(folder, run={"dir": str(folder / name)}, training={"steps": STEPS})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, folder / name


def start(config, *options):
    command = [sys.executable, "-m", "moeport", "train", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_done(run_dir):
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((json.loads(line)["step"] for line in complete), default=0)


def wait_for_step(process, run_dir, step):
    while steps_done(run_dir) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def weights(run_dir):
    folder = list_checkpoints(run_dir / "checkpoints")[-1]
    return folder.name, {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_kill_dash_nine_and_resume_repeat_the_uninterrupted_run(tmp_path):
    config, whole = write_config(tmp_path, "whole")
    train(load_config(config), console=Console(quiet=True))

    config, killed = write_config(tmp_path, "killed")
    moments = random.Random(0)
    for step in (3, 17):
        run = Try(NOTHING, ["train", config, "--resume"], tmp_path / "log")
        run.wait_for(lambda step=step: steps_done(killed) >= step)
        time.sleep(moments.uniform(0, 0.05))
        run.kill()
        run.wait()
    run = Try(NOTHING, ["train", config, "--resume"], tmp_path / "log")
    assert run.wait() == 0, run.said()
    assert "resuming    after step" in run.said()
    assert weights(killed) == weights(whole)
    recorded = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in recorded if "loss" in record] == list(range(1, STEPS + 1))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    config, run_dir = write_config(tmp_path, "run")
    process = start(config, "--set", "checkpoint.interval=0", "--set", "training.steps=100000")
    wait_for_step(process, run_dir, 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (checkpoint,) = list_checkpoints(run_dir / "checkpoints")
    step = int(checkpoint.name.removeprefix("step-"))
    assert step == steps_done(run_dir)
    assert (
        errors.split()
        == (
            f"error: stopped after step {step} of 100000; everything is saved in {run_dir}. "
            "Continue with the same command and --resume"
        ).split()
    )


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("data.source.paths=[nowhere.txt]", 2, "nowhere.txt"),
        ("optimizer.learning_rate=1e30", 1, "is not finite"),
    ],
)
def test_exit_codes_tell_what_the_user_can_mend_from_what_failed(tmp_path, monkeypatch, capsys, setting, code, message):
    pytest.importorskip("torch")
    config, _ = write_config(tmp_path, "run")
    monkeypatch.setattr(sys, "argv", ["moeport", "train", str(config), "--set", setting])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert (exit_.value.code, "Traceback" in errors) == (code, False)
    assert message in errors
