"""Checkpoints that several ranks wrote, and those of older versions, converted like any other; damage is named."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from moeport.convert.from_hf import from_hf
from moeport.convert.to_dcp import to_dcp
from moeport.convert.to_hf import to_hf
from moeport.convert.upcycle import upcycle
from moeport.core.weights import Box, Shard
from moeport.errors import CheckpointError
from moeport.training import checkpoint
from moeport.training.checkpoint import list_checkpoints, open_checkpoint
from moeport.training.checkpoint_writing import complete, part_of, write_rank
from tests.convert.folders import hub_folder
from tests.convert.runs import run_of
from tests.training.older import made_older
from tests.training.whole import load_checkpoint

EXPERTS = "layers.1.moe.experts.w_in"


def halves(name, array):
    """What each of two ranks holds: half of the rows, or of the columns for a part of attention."""
    dim = 1 if name.endswith("attention.q") else 0
    cut = (array.shape[dim] + 1) // 2
    for first, count in ((0, cut), (cut, array.shape[dim] - cut)):
        start = tuple(first if d == dim else 0 for d in range(array.ndim))
        box = Box(start, tuple(count if d == dim else size for d, size in enumerate(array.shape)))
        yield Shard(name, array.shape, box, array[box.slices])


def divide(run_dir):
    """Write the checkpoint of a run again, as two ranks do that hold half of each array."""
    (path,) = list_checkpoints(run_dir / "checkpoints")
    whole = load_checkpoint(path)
    for file in path.iterdir():
        file.unlink()
    for rank in range(2):
        model = [part_of(list(halves(name, array))[rank]) for name, array in whole.model.items()]
        write_rank(path, rank, 2, model, [])
    complete(path, whole.meta, 2, 0.0)


def older(run_dir):
    """Write the checkpoint of a run again, in the format before it was divided."""
    (path,) = list_checkpoints(run_dir / "checkpoints")
    made_older(path, load_checkpoint(path))


def test_a_large_checkpoint_is_in_several_files(tmp_path, monkeypatch):
    hub = hub_folder(tmp_path / "hub", "qwen3_moe")
    from_hf(hub, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 3000)
    from_hf(hub, tmp_path / "several")
    (one,), (several,) = (list_checkpoints(tmp_path / name / "checkpoints") for name in ("one", "several"))
    files = sorted(several.glob("model-*.safetensors"))
    assert len(files) > 3
    assert max(sum(x.nbytes for x in found.values()) for found in map(load_file, files) if len(found) > 1) <= 3000
    before, after = open_checkpoint(one).model, open_checkpoint(several).model
    assert list(before) == list(after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert to_hf(tmp_path / "several", tmp_path / "back").verified


@pytest.mark.parametrize("change", [divide, older])
def test_to_hugging_face_and_to_a_mixture(tmp_path, change):
    hub = hub_folder(tmp_path / "hub", "qwen2_moe")
    from_hf(hub, tmp_path / "run")
    upcycle(tmp_path / "run", tmp_path / "before", ["model.moe.router={name: sigmoid_bias, top_k: 2}"])
    change(tmp_path / "run")
    assert to_hf(tmp_path / "run", tmp_path / "back").verified
    theirs, back = (load_file(folder / "model.safetensors") for folder in (hub, tmp_path / "back"))
    assert theirs.keys() == back.keys()
    assert all(theirs[name].tobytes() == back[name].tobytes() for name in theirs)
    upcycle(tmp_path / "run", tmp_path / "after", ["model.moe.router={name: sigmoid_bias, top_k: 2}"])
    (before,), (after,) = (list_checkpoints(tmp_path / name / "checkpoints") for name in ("before", "after"))
    one, other = open_checkpoint(before).model, open_checkpoint(after).model
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def damage(run_dir, name, expert):
    """Change one byte of an expert."""
    (path,) = list_checkpoints(run_dir / "checkpoints")
    (index,) = path.glob("index-*.json")
    (part,) = json.loads(index.read_text())["model"][name]["parts"]
    file = path / part["file"]
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin = 8 + header + json.loads(data[8 : 8 + header])[part["key"]]["data_offsets"][0]
    data[begin + expert * 4 * int(np.prod(part["shape"][1:])) + 5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("way", [to_hf, to_dcp])
def test_a_damaged_expert_is_named(tmp_path, way):
    if way is to_dcp:
        pytest.importorskip("torch")
    run_of(tmp_path / "run")
    damage(tmp_path / "run", EXPERTS, 2)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}, expert 2: contents do not match their checksum"):
        way(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
