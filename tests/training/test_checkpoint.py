import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeport.core.parameters import ParameterSpec
from moeport.core.weights import Box, read_part
from moeport.errors import CheckpointError, DataError
from moeport.training import checkpoint_meta
from moeport.training.checkpoint import (
    CheckpointMeta,
    best_checkpoint,
    file_entry,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from moeport.training.fits import check_finite, check_optimizer, check_parameters
from tests.training.older import made_older, save_older
from tests.training.whole import load_checkpoint

WEIGHTS, STATE, INDEX = (
    "model-00000-of-00001.safetensors",
    "optimizer-00000-of-00001.safetensors",
    "index-00000-of-00001.json",
)
MODEL = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}
MOMENTS = {f"{moment}.{name}": value * 2 for name, value in MODEL.items() for moment in ("exp_avg", "exp_avg_sq")}


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
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (path / WEIGHTS).write_bytes(bytes(data))


def truncate(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:100])


def edit_meta(resign=False, **changes):
    """Changes values of meta.json; with `resign`, its digest fits again."""

    def edit(path):
        data = json.loads((path / "meta.json").read_text())
        for key, value in changes.items():
            if value is None:
                del data[key]
            else:
                data[key] = value
        write_meta(path, data, resign)

    return edit


def write_meta(path, data, resign=True):
    if resign and "digest" in data:
        del data["digest"]
        data["digest"] = checkpoint_meta._digest(data)
    (path / "meta.json").write_text(json.dumps(data))


def replace_arrays(path, name, data):
    """Puts other contents into a file, with checksums that fit."""
    if isinstance(data, bytes):
        (path / name).write_bytes(data)
    else:
        save_file(data, path / name)
    meta = json.loads((path / "meta.json").read_text())
    try:
        meta["files"][name] = file_entry(path / name)
    except DataError:  # it has no head
        meta["files"][name]["bytes"] = len(data)
    write_meta(path, meta)


def pipe(path):
    (path / "meta.json").unlink()
    os.mkfifo(path / "meta.json")


def bfloat16(path):
    header = b'{"a.weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    replace_arrays(path, WEIGHTS, len(header).to_bytes(8, "little") + header + b"1234")


FAULTS = {
    "truncated": (
        truncate,
        "{path}/" + WEIGHTS + ": truncated or altered: expected {size} bytes, found 100; use another checkpoint",
    ),
    "flipped": (
        flip_byte,
        "{path}/" + WEIGHTS + ": b: contents do not match their checksum; use another checkpoint",
    ),
    "no file": (
        lambda path: (path / STATE).unlink(),
        "{path}/" + STATE + ": missing; the checkpoint is incomplete, use another one",
    ),
    "no meta": (
        lambda path: (path / "meta.json").unlink(),
        "{path}: not a moeport checkpoint: it has no meta.json",
    ),
    "meta cut": (
        lambda path: (path / "meta.json").write_text('{"format": '),
        "{path}/meta.json: not valid JSON (not JSON: Expecting value at line 1 column 12); use another checkpoint",
    ),
    "foreign meta": (
        lambda path: (path / "meta.json").write_text('{"architectures": ["MixtralForCausalLM"]}'),
        '{path}/meta.json: not written by moeport: expected "format": "moeport-checkpoint"',
    ),
    "newer": (
        edit_meta(format_version=9),
        "{path}/meta.json: format version 9, but this moeport reads versions 1 to 3; "
        "use a moeport version that reads it",
    ),
    "incomplete meta": (
        edit_meta(step=None, tokenizer=None),
        "{path}/meta.json: incomplete: missing step, tokenizer; use another checkpoint",
    ),
    "foreign arrays": (
        lambda path: replace_arrays(path, WEIGHTS, b"PK\x03\x04 not tensors at all"),
        "{path}/" + WEIGHTS + ": is not a safetensors file, or is cut off; use another checkpoint",
    ),
    "arrays of a type that numpy lacks": (
        bfloat16,
        "{path}/" + WEIGHTS + ": a.weight is BF16 of shape (2,), but F32 of shape (3, 4) in the index; "
        "use another checkpoint",
    ),
    "a value of meta changed": (
        edit_meta(tokens=71),
        "{path}/meta.json: contents do not match their checksum; use another checkpoint",
    ),
    "a value deep in meta changed": (
        edit_meta(config={"model": {"d_model": 3}}),
        "{path}/meta.json: contents do not match their checksum; use another checkpoint",
    ),
    "no digest": (edit_meta(digest=None), "{path}/meta.json: incomplete: missing digest; use another checkpoint"),
    "a file too many in meta": (
        lambda path: edit_meta(resign=True, files=listed(path) | {"../x": {"bytes": 1, "sha256": "0" * 64}})(path),
        "{path}/meta.json: files is {listed}, expected size and SHA-256 of the model, optimizer and index files of "
        "every rank, and no more; use another checkpoint",
    ),
    "a file too few in meta": (
        edit_meta(resign=True, files={}),
        "{path}/meta.json: files is {{}}, expected size and SHA-256 of the model, optimizer and index files of every "
        "rank, and no more; use another checkpoint",
    ),
    "a file too many": (
        lambda path: (path / "more.bin").write_text("x"),
        "{path}/more.bin: does not belong to the checkpoint, whose files meta.json lists; move it to another folder",
    ),
    "of another step": (
        edit_meta(resign=True, step=8),
        "{path}: holds the checkpoint of step 8, which belongs in a folder step-000008; rename it, or use another "
        "checkpoint",
    ),
    "wrong type": (
        edit_meta(resign=True, config="x"),
        '{path}/meta.json: config is "x", expected an object; use another checkpoint',
    ),
    "a boolean step": (
        edit_meta(resign=True, step=True),
        "{path}/meta.json: step is true, expected an integer of at least 0; use another checkpoint",
    ),
    "deep meta": (
        lambda path: (path / "meta.json").write_text("[" * 100_000),
        "{path}/meta.json: not valid JSON (JSON that is nested too deeply); use another checkpoint",
    ),
    "meta of bytes": (
        lambda path: (path / "meta.json").write_bytes(b"\xff\xfe"),
        "{path}/meta.json: not valid JSON (not JSON: Expecting value at line 1 column 1); use another checkpoint",
    ),
    "meta is a folder": (
        lambda path: [(path / "meta.json").unlink(), (path / "meta.json").mkdir()],
        "{path}: not a moeport checkpoint: it has no meta.json",
    ),
    "meta is a pipe": (
        pipe,
        "{path}: not a moeport checkpoint: it has no meta.json",
    ),
}


def listed(path):
    return json.loads((path / "meta.json").read_text())["files"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused(saved, fault):
    size = (saved / WEIGHTS).stat().st_size
    damage, message = FAULTS[fault]
    damage(saved)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(saved)
    shown = ""
    if "{listed}" in message:
        shown = json.dumps(listed(saved))[:60]
    assert str(error.value) == message.format(path=saved, size=size, listed=shown)


def refusal(path):
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None


def test_every_flipped_bit_of_a_checkpoint_is_refused_by_the_name_of_its_file(saved):
    """Except in meta.json's white space, where it may change nothing."""
    for name in ("meta.json", WEIGHTS, STATE, INDEX):
        data = (saved / name).read_bytes()
        for place in range(0, len(data), 7):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            (saved / name).write_bytes(bytes(flipped))
            found = refusal(saved)
            if found is None:
                assert json.loads(flipped) == json.loads(data)
            else:
                assert found.startswith(f"{saved / name}:")
        (saved / name).write_bytes(data)


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_older_versions_are_read(tmp_path, version):
    path = save_older(tmp_path, meta(7, 1.5), MODEL, MOMENTS, version)
    loaded = load_checkpoint(path)
    assert loaded.meta == meta(7, 1.5)
    for name, value in (MODEL | MOMENTS).items():
        np.testing.assert_array_equal((loaded.model | loaded.optimizer)[name], value)
    part = read_part(open_checkpoint(path).model, "a.weight", Box((1, 2), (2, 1)))
    np.testing.assert_array_equal(part, MODEL["a.weight"][1:3, 2:3])
    flipped = bytearray((path / "optimizer.safetensors").read_bytes())
    flipped[-3] ^= 1
    (path / "optimizer.safetensors").write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"/optimizer\.safetensors: contents do not match their checksum"):
        open_checkpoint(path)
    edit_meta(step=8)(path)
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 8" if version == 1 else "checksum"):
        load_checkpoint(path)


def test_a_type_that_numpy_lacks_is_refused(tmp_path):
    path = save_older(tmp_path, meta(7), MODEL, MOMENTS, 2)
    header = b'{"a.weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    replace_arrays(path, "model.safetensors", len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: a\.weight has the type BF16, which numpy lacks; use"
    ):
        open_checkpoint(path)


def test_hidden_files_in_a_checkpoint_are_no_part_of_it(saved):
    (saved / ".DS_Store").write_text("x")
    assert load_checkpoint(saved).meta.step == 7


SPECS = [ParameterSpec("a.weight", (3, 4)), ParameterSpec("b", (5,))]
BIASED = [*SPECS, ParameterSpec("bias", (2,), trainable=False)]


@pytest.mark.parametrize(
    ("specs", "model", "message"),
    [
        (
            [ParameterSpec("a.weight", (3, 5)), ParameterSpec("c", (2,))],
            MODEL,
            "a.weight: shape (3, 4), expected (3, 5); b: not in this model; c: missing",
        ),
        (SPECS, MODEL | {"b": np.ones(5, np.int64)}, "b: int64, expected float32 or float64"),
        (SPECS, MODEL | {"b": np.ones(5, np.complex64)}, "b: complex64, expected float32 or float64"),
        (SPECS, MODEL | {"b": np.ones(5, np.float16)}, "b: float16, expected float32 or float64"),
        (SPECS, MODEL | {"b": np.ones((), np.float32)}, "b: shape (), expected (5,)"),
        (BIASED, MODEL, "bias: missing"),
        (BIASED, MODEL | {"bias": np.ones(3, np.float32)}, "bias: shape (3,), expected (2,)"),
    ],
)
def test_parameters_of_another_model_are_refused(saved, specs, model, message):
    with pytest.raises(CheckpointError) as error:
        check_parameters(replace(load_checkpoint(saved), model=model), specs)
    assert str(error.value) == f"{saved}: does not fit the model of the config: {message}"


@pytest.mark.parametrize(
    ("changes", "updates", "message"),
    [
        ({"exp_avg.b": np.ones(1, np.float32)}, 7, "exp_avg.b: shape (1,), expected (5,)"),
        ({"exp_avg_sq.b": None}, 7, "exp_avg_sq.b: missing"),
        ({"exp_avg.c": np.ones(5, np.float32)}, 7, "exp_avg.c: not in this model"),
        ({"exp_avg.bias": np.ones(2, np.float32)}, 7, "exp_avg.bias: not in this model"),
        ({"exp_avg.b": np.ones(5, np.int32)}, 7, "exp_avg.b: int32, expected float32 or float64"),
        ({"max_exp_avg_sq.b": np.ones(5, np.float32)}, 7, "max_exp_avg_sq.b: not in this model"),
        ({name: None for name in MOMENTS if name != "exp_avg.b"}, 0, "exp_avg.b: not in this model"),
    ],
)
def test_an_optimiser_state_of_another_model_is_refused(saved, changes, updates, message):
    state = {name: value for name, value in (MOMENTS | changes).items() if value is not None}
    with pytest.raises(CheckpointError) as error:
        check_optimizer(replace(load_checkpoint(saved), optimizer=state), BIASED, updates)
    assert str(error.value) == (
        f"{saved}: the optimiser's state does not fit the model of the config: {message}; use another checkpoint"
    )


def test_an_optimiser_state_that_fits_passes(saved):
    loaded = load_checkpoint(saved)
    check_optimizer(loaded, BIASED, 7)
    check_optimizer(replace(loaded, optimizer={}), BIASED, 0)
    with pytest.raises(CheckpointError, match=r"exp_avg\.a\.weight: missing; exp_avg\.b: missing; "):
        check_optimizer(replace(loaded, optimizer={}), BIASED, 7)


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_checkpoint_of_a_diverged_run_is_refused(saved, part, value):
    loaded = load_checkpoint(saved)
    check_finite(loaded)
    name, array = next(iter(getattr(loaded, part).items()))
    array.flat[1] = value
    with pytest.raises(CheckpointError) as error:
        check_finite(loaded)
    assert str(error.value) == (
        f"{saved}: {name} holds a NaN or an infinity: the run had diverged; use an earlier checkpoint"
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


def test_a_loss_that_is_not_finite_is_not_the_best(tmp_path):
    """Nor is one that an older moeport wrote into meta.json."""
    for step, loss in ((1, float("nan")), (2, 2.0), (3, 1.5), (4, -float("inf"))):
        path = save_checkpoint(tmp_path, meta(step, loss), MODEL, {})
    assert load_checkpoint(path).meta.val_loss is None
    assert best_checkpoint(tmp_path).name == "step-000003"
    edit_meta(val_loss=float("nan"))(made_older(path, load_checkpoint(path), 1))
    assert best_checkpoint(tmp_path).name == "step-000003"


def test_a_damaged_checkpoint_does_not_stop_the_others_from_being_kept(tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
        save_checkpoint(tmp_path, meta(step, loss), MODEL, {})
    (tmp_path / "step-000002/meta.json").write_text("{")
    (tmp_path / "step-000005").write_text("a file is no checkpoint")
    assert best_checkpoint(tmp_path).name == "step-000001"
    prune_checkpoints(tmp_path, keep_last=1, keep_best=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000004"]


def test_pruning_keeps_the_last_and_the_best(tmp_path):
    for step, loss in ((1, None), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        save_checkpoint(tmp_path, meta(step, loss), MODEL, {})
    host, dead = socket.gethostname(), subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".step-000006.{host}-{dead.pid}-0123abcd.tmp").mkdir()
    others = [f".step-000006.{host}-{os.getppid()}-0123abcd.tmp", f".step-000006.elsewhere-{dead.pid}-0123abcd.tmp"]
    for name in others:
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, keep_last=2, keep_best=True)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"step-000002", "step-000004", "step-000005", *others}, "what others are writing stays"


class Killed(BaseException):
    pass


def test_a_death_at_any_moment_leaves_only_whole_checkpoints(tmp_path, monkeypatch):
    """Die at each successive system call of a save that replaces and prunes; every step-* left must load."""
    calls = {
        "open": os.open,
        "fsync": lambda descriptor: None,
        "rename": os.rename,
        "mkdir": os.mkdir,
        "unlink": os.unlink,
    }
    survived = 0
    for step in (1, 2):
        save_checkpoint(tmp_path / "before", meta(step, float(step)), MODEL, MOMENTS)
    for deadline in range(200):
        folder = tmp_path / str(deadline)
        shutil.copytree(tmp_path / "before", folder)
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
