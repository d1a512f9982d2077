import json
import os
import shutil

import numpy as np
import pytest

from moeport.core.parameters import ParameterSpec
from moeport.errors import CheckpointError
from moeport.training import checkpoint as module
from moeport.training.checkpoint import (
    CheckpointMeta,
    check_parameters,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

MODEL = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}
MOMENTS = {f"exp_avg.{name}": value * 2 for name, value in MODEL.items()}


def meta(step, val_loss=None):
    return CheckpointMeta(
        step=step, tokens=step * 10, val_loss=val_loss, tokenizer="t", data="d", config={"model": {}}, version="0"
    )


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path, meta(7, 1.5), MODEL, MOMENTS)


def test_what_is_saved_is_loaded(saved):
    loaded = load_checkpoint(saved)
    assert saved.name == "step-000007"
    assert loaded.meta == meta(7, 1.5)
    for name, value in MODEL.items():
        np.testing.assert_array_equal(loaded.model[name], value)
    assert loaded.optimizer.keys() == MOMENTS.keys()


def flip_byte(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(bytes(data))


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:100])


def edit_meta(**changes):
    def edit(path):
        data = json.loads((path / "meta.json").read_text())
        for key, value in changes.items():
            if value is None:
                del data[key]
            else:
                data[key] = value
        (path / "meta.json").write_text(json.dumps(data))

    return edit


def foreign_arrays(path):
    """A file that is no safetensors, with a checksum that fits."""
    (path / "model.safetensors").write_bytes(b"PK\x03\x04 not tensors at all")
    data = json.loads((path / "meta.json").read_text())
    data["files"]["model.safetensors"] = module.file_digest(path / "model.safetensors")
    (path / "meta.json").write_text(json.dumps(data))


FAULTS = {
    "truncated": (
        truncate,
        "{path}/model.safetensors: truncated or altered: expected {size} bytes, found 100; use another checkpoint",
    ),
    "flipped": (
        flip_byte,
        "{path}/model.safetensors: contents do not match their checksum; use another checkpoint",
    ),
    "no file": (
        lambda path: (path / "optimizer.safetensors").unlink(),
        "{path}/optimizer.safetensors: missing; the checkpoint is incomplete, use another one",
    ),
    "no meta": (
        lambda path: (path / "meta.json").unlink(),
        "{path}: not a moeport checkpoint: it has no meta.json",
    ),
    "meta cut": (
        lambda path: (path / "meta.json").write_text('{"format": '),
        "{path}/meta.json: not valid JSON (Expecting value: line 1 column 12 (char 11)); use another checkpoint",
    ),
    "foreign meta": (
        lambda path: (path / "meta.json").write_text('{"architectures": ["MixtralForCausalLM"]}'),
        '{path}/meta.json: not written by moeport: expected "format": "moeport-checkpoint"',
    ),
    "newer": (
        edit_meta(format_version=9),
        "{path}/meta.json: format version 9, but this moeport reads version 1; use a moeport version that reads it",
    ),
    "incomplete meta": (
        edit_meta(step=None, tokenizer=None),
        "{path}/meta.json: incomplete: missing step, tokenizer; use another checkpoint",
    ),
    "foreign arrays": (
        foreign_arrays,
        "{path}: not a safetensors file: Error while deserializing header: header too large; use another checkpoint",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused(saved, fault):
    size = (saved / "model.safetensors").stat().st_size
    damage, message = FAULTS[fault]
    damage(saved)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(saved)
    assert str(error.value) == message.format(path=saved, size=size)


def test_parameters_of_another_model_are_refused(saved):
    specs = [ParameterSpec("a.weight", (3, 5)), ParameterSpec("c", (2,))]
    with pytest.raises(CheckpointError) as error:
        check_parameters(load_checkpoint(saved), specs)
    assert str(error.value) == (
        f"{saved}: does not fit the model of the config: a.weight: shape (3, 4), expected (3, 5); "
        "b: not in this model; c: missing"
    )


def test_names_that_can_be_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint; train first"):
        find_checkpoint(tmp_path, "latest")
    for step, loss in ((1, None), (2, 3.0), (3, 2.0), (4, 2.5), (5, None)):
        save_checkpoint(tmp_path, meta(step, loss), MODEL, {})
    assert find_checkpoint(tmp_path, "latest").name == "step-000005"
    assert find_checkpoint(tmp_path, "best").name == "step-000003"
    assert find_checkpoint(tmp_path, "step-2").name == "step-000002"
    with pytest.raises(CheckpointError, match=r"no checkpoint step-9; expected latest, best or one of step-000001, "):
        find_checkpoint(tmp_path, "step-9")


def test_pruning_keeps_the_last_and_the_best(tmp_path):
    for step, loss in ((1, None), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        save_checkpoint(tmp_path, meta(step, loss), MODEL, {})
    (tmp_path / ".step-000006.1.tmp").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, keep_best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


class Killed(BaseException):
    pass


def test_a_death_at_any_moment_leaves_only_whole_checkpoints(tmp_path, monkeypatch):
    """Die at each successive system call of a save that replaces and prunes; every step-* left must load."""
    calls = {"open": os.open, "fsync": os.fsync, "rename": os.rename, "mkdir": os.mkdir, "unlink": os.unlink}
    survived = 0
    for deadline in range(200):
        folder = tmp_path / str(deadline)
        save_checkpoint(folder, meta(1, 1.0), MODEL, MOMENTS)
        save_checkpoint(folder, meta(2, 2.0), MODEL, MOMENTS)
        count = 0

        def dying(call, last=deadline):
            def run(*args, **kwargs):
                nonlocal count
                count += 1
                if count > last:
                    raise Killed
                return call(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            for name, call in calls.items():
                patch.setattr(os, name, dying(call))
            try:
                save_checkpoint(folder, meta(2, 2.0), MODEL, MOMENTS)
                save_checkpoint(folder, meta(3, 3.0), MODEL, MOMENTS)
                prune_checkpoints(folder, keep_last=1, keep_best=True)
                survived += 1
            except Killed:
                pass
        paths = list_checkpoints(folder)
        assert 1 in [load_checkpoint(path).meta.step for path in paths]
        if survived:
            assert [path.name for path in paths] == ["step-000001", "step-000003"]
            break
        shutil.rmtree(folder)
    assert deadline > 20
    assert survived == 1
