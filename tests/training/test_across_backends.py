"""One config on torch and on MindSpore: the same curve, and checkpoints that either continues."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from moeport.config import resolved_yaml
from moeport.training.routing_log import read_routing
from moeport.training.run import train
from moeport.training.run_dir import METRICS_FILE, ROUTING_FILE
from tests.comm.jobs import ROOT, start
from tests.training.tiny import tiny_config

pytest.importorskip("mindspore")

STEPS = 4


def run(folder, backend, stop=None, resume=False, steps=STEPS, dtype="float32", compiled=None, **sections):
    """The losses of a run, by step; `stop`: end after this many steps, as an interrupted run would."""
    config = tiny_config(
        folder,
        backend={"name": backend, "dtype": dtype, "compile": compiled},
        training={"steps": steps, "evaluation_interval": 0},
        model={"num_layers": 1, "moe": {"router": {"name": "sigmoid_bias", "top_k": 2}}},
        **sections,
    )
    if stop:
        interrupted(config, stop)
    else:
        train(config, resume=resume, console=Console(quiet=True))
    lines = (config.run.dir / METRICS_FILE).read_text().splitlines()
    return [record["total_loss"] for record in map(json.loads, lines) if "total_loss" in record]


def interrupted(config, stop):
    """Train all steps, then leave only what was there after `stop`."""
    train(config, console=Console(quiet=True))
    for path in (config.run.dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > stop:
            shutil.rmtree(path)
    (config.run.dir / "summary.json").unlink()


@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [
        ("torch", "mindspore", "adamw"),
        pytest.param("mindspore", "torch", "adamw", marks=pytest.mark.slow),  # from 2 ranks below
        ("torch", "mindspore", "muon"),
        pytest.param("mindspore", "torch", "muon", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_on_one_backend_continues_on_the_other(tmp_path, first, second, optimizer):
    compiles = {"torch": None, "mindspore": False}  # test_steps_stay_together compiles
    options = {"optimizer": {"name": optimizer}}
    whole = run(tmp_path, first, stop=2, compiled=compiles[first], **options)
    moved = run(tmp_path, second, resume=True, compiled=compiles[second], **options)
    assert len(moved) == len(whole) == STEPS
    np.testing.assert_allclose(moved, whole, rtol=1e-5)
    np.testing.assert_array_equal(moved[:2], whole[:2])


@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_steps_stay_together(tmp_path, steps):
    """In float64: in float32 PyTorch with two threads parts from PyTorch with one, by choices that nearly tie.

    The graphs that MindSpore compiles for them are few, and the summary counts them.
    """
    torch, mindspore = (
        run(tmp_path / name, name, steps=steps, dtype="float64", checkpoint={"interval": 0})
        for name in ("torch", "mindspore")
    )
    np.testing.assert_allclose(mindspore, torch, rtol=0, atol=1e-3)
    assert torch[-1] < 0.7 * torch[0]
    ours, others = (read_routing(tmp_path / name / "run" / ROUTING_FILE).records for name in ("torch", "mindspore"))
    for a, b in zip(ours, others, strict=True):
        assert a.count_LXE.sum() > 100
        assert a.count_LXE.tolist() == b.count_LXE.tolist()
    summary = json.loads((tmp_path / "mindspore" / "run" / "summary.json").read_text())
    assert 2 <= summary["compilations"] <= 8
    assert summary["compile_seconds"] > 0


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_one_step_can_be_profiled(tmp_path, backend):
    run(tmp_path, backend, steps=2, compiled=False, metrics={"profile_step": 2})
    assert [path for path in (tmp_path / "run" / "profile").rglob("*") if path.is_file() and path.stat().st_size]


def job(folder, backend, ranks, expert, *arguments):
    """`moeport train` of 2 steps on some ranks; the total losses by step."""
    config = tiny_config(
        folder,
        backend={"name": backend, "dtype": "float32", "compile": False},
        model={"num_layers": 1, "moe": {"router": {"name": "sigmoid_bias", "top_k": 2}}},
        training={"steps": 2, "evaluation_interval": 0},
        parallelism={"expert": expert},
    )
    if ranks == 1:
        train(config, resume="--resume" in arguments, console=Console(quiet=True))
    else:
        file, place = folder / f"{backend}-{ranks}.yaml", folder / f"job-{backend}-{ranks}-{len(arguments)}"
        file.write_text(resolved_yaml(config))
        script = str(ROOT / "tests/training/ranks_cli.py")
        started = start(backend, ranks, [script, str(place), "train", str(file), *arguments], place)
        try:
            assert (started.wait(280), started.left()) == (0, []), started.output()[-3000:]
        finally:
            started.end()
    lines = (folder / "run" / METRICS_FILE).read_text().splitlines()
    return [record["total_loss"] for record in map(json.loads, lines) if "total_loss" in record]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("mindspore", 2, 2), ("torch", 1, 1)),
        pytest.param(("mindspore", 2, 2), ("torch", 4, 2), marks=pytest.mark.slow),
        pytest.param(("torch", 4, 2), ("mindspore", 2, 1), marks=pytest.mark.slow),
        pytest.param(("mindspore", 2, 1), ("mindspore", 4, 2), marks=pytest.mark.slow),
        pytest.param(("mindspore", 4, 2), ("mindspore", 1, 1), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_backend_and_other_ranks(tmp_path, first, second):
    """Each rank writes what it holds, and reads what it will hold."""
    whole = job(tmp_path, *first)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    (tmp_path / "run" / "summary.json").unlink()
    moved = job(tmp_path, *second, "--resume")
    assert len(moved) == len(whole) == 2
    np.testing.assert_allclose(moved, whole, rtol=1e-6)
    assert moved[0] == whole[0]
