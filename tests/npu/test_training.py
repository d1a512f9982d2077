"""Training on the real torch_npu front end with emulated kernels: what a user does, beside the same on the CPU."""

import json
import sys

import numpy as np
import pytest
from rich.console import Console

from moeport.cli.main import main
from moeport.config import load_config, resolved_yaml
from moeport.training.generate import generate
from moeport.training.metrics import read_metrics
from moeport.training.run import train
from tests.comm.jobs import ROOT
from tests.npu.emulation import calls
from tests.training.tiny import tiny_values

STEPS = 4
QUICKSTART = ROOT / "configs/quickstart.yaml"
"""Its model, router and losses as they are, on less text."""
CLOSE = 1e-5
"""Relative to a loss. The kernels that differ round otherwise: 6e-7 was measured."""


def quickstart(folder, device, **more):
    """The quickstart on a few files, a byte-level vocabulary and short sequences, in float32."""
    source = tiny_values(folder)["data"]["source"]
    settings = {
        "run.dir": folder / "run",
        "data.source": json.dumps(source),
        "data.tokenizer": json.dumps({"name": "byte"}),
        "data.sequence_length": 32,
        "data.cache_dir": folder / "cache",
        "training.steps": STEPS,
        "training.evaluation_interval": 0,
        "optimizer.schedule": json.dumps({"name": "constant", "warmup_steps": 2}),  # the number of steps may change
        "checkpoint.interval": 1,
        "checkpoint.keep_last": STEPS,
        "metrics": json.dumps({"tensorboard": False, "report": False, "sample_prompt": None, "peak_tflops": 1.0}),
        "backend.device": device,
        "backend.dtype": "float32",
    }
    return load_config(QUICKSTART, [f"{key}={value}" for key, value in (settings | more).items()])


def losses(config):
    steps, evaluations = read_metrics(config.run.dir / "metrics.jsonl")
    return [record.total_loss for record in steps], [record.val_loss for record in evaluations]


def trained(config, resume=False):
    train(config, resume=resume, console=Console(quiet=True))
    return losses(config)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The run on the CPU, and what it gives."""
    config = quickstart(tmp_path_factory.mktemp("cpu"), "cpu")
    return config, trained(config)


@pytest.fixture(scope="module")
def on_npu(tmp_path_factory):
    config = quickstart(tmp_path_factory.mktemp("npu"), "npu")
    before = sum(calls.values())
    found = trained(config)
    assert sum(calls.values()) - before > 1000, "the device has not computed it"
    return config, found


def test_the_quickstart_has_the_losses_of_the_cpu(on_cpu, on_npu):
    (_, (steps, evaluations)), (_, found) = on_cpu, on_npu
    assert (len(steps), len(evaluations)) == (STEPS, 1)
    np.testing.assert_allclose(found[0], steps, rtol=CLOSE)
    np.testing.assert_allclose(found[1], evaluations, rtol=CLOSE)
    assert steps[-1] < steps[0]


def test_micro_batches_have_the_losses_of_the_cpu(tmp_path):
    found = [
        trained(quickstart(tmp_path / device, device, **{"training.gradient_accumulation": 2, "training.steps": 2}))
        for device in ("cpu", "npu")
    ]
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=CLOSE)


def test_recomputed_blocks_have_the_losses_of_those_that_are_kept(tmp_path, on_npu):
    found = trained(quickstart(tmp_path, "npu", **{"training.activation_checkpointing": True, "training.steps": 2}))
    np.testing.assert_allclose(found[0], on_npu[1][0][:2], rtol=CLOSE)


def test_a_run_moves_between_devices(tmp_path, on_cpu):
    """A step on the device, two on the CPU and one on the device again, each from the other's checkpoint."""
    for device, end in (("npu", 1), ("cpu", 3), ("npu", STEPS)):
        config = quickstart(tmp_path, device, **{"training.steps": end})
        trained(config, resume=True)
    np.testing.assert_allclose(losses(config)[0], on_cpu[1][0], rtol=CLOSE)
    starts = [json.loads(line) for line in (config.run.dir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 1, 3]


def test_text_is_the_same_as_on_the_cpu(on_cpu, on_npu):
    texts = [generate(config.run.dir, "def f", temperature=0, max_tokens=12) for config, _ in (on_cpu, on_npu)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 0


def test_the_commands(tmp_path, monkeypatch, capsys):
    """`moeport train` and `moeport generate` say what they run on."""
    config = quickstart(tmp_path, "npu")
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    for command in (
        ["train", str(tmp_path / "config.yaml"), "--set", "training.steps=2"],
        ["generate", str(config.run.dir), "--prompt", "def", "--max-tokens", "4", "--temperature", "0"],
    ):
        monkeypatch.setattr(sys, "argv", ["moeport", *command])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None), capsys.readouterr()
    out = capsys.readouterr().out
    assert "npu (Ascend910" in out
    assert out.splitlines()[-1].startswith("def")
