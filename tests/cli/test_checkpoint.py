"""`moeport checkpoint`."""

import numpy as np
import pytest
from typer.testing import CliRunner

from moeport.cli.main import app, main
from moeport.training.checkpoint import save_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta

EXPERTS = {"layers.0.moe.experts.w_in": np.ones((2, 3, 4), np.float32)}


@pytest.fixture
def run_dir(tmp_path):
    for step, loss in ((1, None), (2, 2.5)):
        meta = CheckpointMeta(step, 10_000 * step, loss, "t", "d", {}, "0")
        save_checkpoint(tmp_path / "checkpoints", meta, EXPERTS, {})
    return tmp_path


def said(*arguments):
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_checkpoints_are_listed(run_dir):
    first, second = said("list", run_dir)
    assert first.startswith("step-000001  10,000 tokens, not evaluated, 1 array, ")
    assert second.startswith("step-000002  20,000 tokens, val_loss 2.5000, 1 array, ")
    assert second.endswith(" bytes, of 1 rank")
    assert said("list", run_dir / "checkpoints/step-000002") == [second]


def test_a_damaged_expert_is_named(run_dir, monkeypatch, capsys):
    assert said("verify", run_dir) == ["step-000001  good", "step-000002  good"]
    file = run_dir / "checkpoints/step-000001/model-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["moeport", "checkpoint", "verify", str(run_dir)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out.splitlines() == ["step-000001  damaged", "step-000002  good"]
    assert "layers.0.moe.experts.w_in, expert 1: contents do not match their checksum" in " ".join(err.split())
    (file.parent / "meta.json").write_text("{}")
    assert said("list", run_dir)[0].startswith("step-000001  damaged: ")


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moeport", "checkpoint", "list", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "is neither a checkpoint nor a run folder with checkpoints in checkpoints/" in " ".join(
        capsys.readouterr().err.split()
    )
