"""Checkpoints that several ranks have written, read in parts."""

import itertools
import json
import os
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from moeport.core.weights import Box, Shard
from moeport.errors import CheckpointError, WriteError
from moeport.files import put_folder, start_folder
from moeport.training import checkpoint_index, checkpoint_meta
from moeport.training.checkpoint import open_checkpoint, verify_checkpoint
from moeport.training.checkpoint_index import blocks
from moeport.training.checkpoint_meta import CheckpointMeta, file_digest, file_entry
from moeport.training.checkpoint_writing import complete, give_up, part_of, write_rank
from moeport.training.tensor_file import read_head, read_header

EXPERTS = "layers.3.moe.experts.w_in"
META = CheckpointMeta(7, 70, 1.5, "t", "d", {"model": {}}, "0")
RANDOM = np.random.default_rng(0)
MODEL = {
    EXPERTS: RANDOM.standard_normal((8, 3, 5), np.float32),
    "head.weight": RANDOM.standard_normal((6, 8), np.float32),
    "norm": RANDOM.standard_normal(9, np.float32),
    "scale": np.array(3.0, np.float32),
}
MOMENTS = {f"exp_avg.{name}": np.asarray(value * 2, np.float32) for name, value in MODEL.items()}
DIMS = {EXPERTS: 0, "head.weight": 1}
"""Along which dimension an array is divided; others are whole on one rank."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoint_index, "BLOCK_ENTRIES", 7)


def shards(arrays, rank, ranks):
    for number, (name, value) in enumerate(arrays.items()):
        dim = DIMS.get(name.removeprefix("exp_avg."))
        if dim is None:
            if number % ranks == rank:
                yield Shard(name, value.shape, Box.whole(value.shape), value)
            continue
        count = value.shape[dim] // ranks
        start, shape = [0] * value.ndim, list(value.shape)
        start[dim], shape[dim] = rank * count, count
        box = Box(tuple(start), tuple(shape))
        yield Shard(name, value.shape, box, value[box.slices])


def write(directory, ranks, meta=META, model=MODEL, moments=MOMENTS):
    final = directory / "step-000007"
    folder = start_folder(final)
    for rank in reversed(range(ranks)):
        parts = ([part_of(shard) for shard in shards(arrays, rank, ranks)] for arrays in (model, moments))
        write_rank(folder, rank, ranks, *parts)
    complete(folder, meta, ranks, 1.0)
    put_folder(folder, final)
    return final


def boxes(shape):
    for ranges in itertools.product(*([(0, n), (n // 2, n - n // 2), (n - 1, 1)] for n in shape)):
        yield Box(tuple(first for first, _ in ranges), tuple(count for _, count in ranges))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_part_is_read_whoever_wrote_it(tmp_path, ranks):
    checkpoint = verify_checkpoint(write(tmp_path, ranks))
    assert checkpoint.meta == META
    for arrays, want in ((checkpoint.model, MODEL), (checkpoint.optimizer, MOMENTS)):
        assert sorted(arrays) == sorted(want)
        for name, value in want.items():
            assert (arrays.shape(name), arrays.dtype(name)) == (value.shape, "float32")
            np.testing.assert_array_equal(arrays[name], value)
            for box in boxes(value.shape):
                np.testing.assert_array_equal(arrays.read(name, box), value[box.slices])


def test_the_files_are_those_of_safetensors_with_a_key_for_each_part(tmp_path):
    path = write(tmp_path, 2)
    files = {file.name: load_file(file) for file in sorted(path.glob("model-*.safetensors"))}
    assert list(files) == ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    first, second = files.values()
    assert first.keys() == {f"{EXPERTS}[0:4, 0:3, 0:5]", "head.weight[0:6, 0:4]", "norm"}
    assert second.keys() == {f"{EXPERTS}[4:8, 0:3, 0:5]", "head.weight[0:6, 4:8]", "scale"}
    np.testing.assert_array_equal(second["head.weight[0:6, 4:8]"], MODEL["head.weight"][:, 4:])


def test_blocks_are_every_entry_once_in_order_and_never_of_two_experts():
    chance = random.Random(0)
    for _ in range(300):
        shape = tuple(chance.choice((1, 2, 3, 5, 9)) for _ in range(chance.randrange(4)))
        box = Box(tuple(chance.randrange(3) for _ in shape), shape)
        by_row = chance.random() < 0.5
        order = np.arange(box.size).reshape(shape)
        found = list(blocks(box, by_row))
        seen = [order[block.within(box).slices].ravel() for block in found]
        np.testing.assert_array_equal(np.concatenate(seen), np.arange(box.size))
        assert all(block.size <= checkpoint_index.BLOCK_ENTRIES for block in found)
        if by_row and shape:
            assert all(block.shape[0] == 1 for block in found)
    assert len(list(blocks(Box((0, 0), (4, 2)), by_row=False))) == 2, "no more blocks than it takes"


def flip(path, name, row):
    """Changes a bit of the last entry of a row of an array; returns the name of the file that has it."""
    for file in sorted(path.glob("index-*.json")):
        index = json.loads(file.read_text())
        for part in (part for kind in ("model", "optimizer") for part in index[kind].get(name, {"parts": []})["parts"]):
            first, count = part["start"][0], part["shape"][0]
            if first <= row < first + count:
                stored = read_header(path / part["file"])[part["key"]]
                data = bytearray((path / part["file"]).read_bytes())
                data[stored.offset + 4 * stored.size * (row - first + 1) // count - 4] ^= 1
                (path / part["file"]).write_bytes(data)
                return part["file"]
    raise AssertionError(name)


@pytest.mark.parametrize("expert", range(8))
@pytest.mark.parametrize("prefix", ["", "exp_avg."])
def test_a_damaged_expert_is_named(tmp_path, expert, prefix):
    path = write(tmp_path, 2)
    file = flip(path, prefix + EXPERTS, expert)
    message = (
        f"{path / file}: {prefix}{EXPERTS}, expert {expert}: contents do not match their checksum; "
        "use another checkpoint"
    )
    checkpoint = open_checkpoint(path)
    arrays = checkpoint.optimizer if prefix else checkpoint.model
    for other in range(8):
        box = Box((other, 0, 0), (1, 3, 5))
        if other != expert:
            assert arrays.read(prefix + EXPERTS, box).shape == (1, 3, 5)
            continue
        with pytest.raises(CheckpointError) as error:
            arrays.read(prefix + EXPERTS, box)
        assert str(error.value) == message
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(path)
    assert str(error.value) == message


def resigned(path, entry_of=file_entry):
    """Makes the digests of meta.json fit what lies in the folder."""
    meta = json.loads((path / "meta.json").read_text())
    meta["files"] = {name: entry_of(path / name) for name in meta["files"]}
    del meta["digest"]
    (path / "meta.json").write_text(json.dumps({**meta, "digest": checkpoint_meta._digest(meta)}))


def edit_index(path, change, number=0):
    """Changes an index, whose digest then fits again."""
    file = path / f"index-{number:05d}-of-00002.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    resigned(path)


def part(index, name=EXPERTS):
    return index["model"][name]["parts"][0]


def move(path, start):
    edit_index(path, lambda index: part(index).update(start=start))


def swap(path, *names):
    one, other = (path / name for name in names)
    one.rename(path / "third")
    other.rename(one)
    (path / "third").rename(other)


def without_array(path):
    edit_index(path, lambda index: index["model"].pop(EXPERTS))


FIRST, SECOND = "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"
USE = "; use another checkpoint"
FAULTS = {
    "a missing part": (lambda path: (path / SECOND).unlink(), f"/{SECOND}: missing; the checkpoint is incomplete"),
    "a part cut off": (lambda path: os.truncate(path / SECOND, 300), f"/{SECOND}: truncated or altered: expected "),
    "an index cut off": (
        lambda path: os.truncate(path / "index-00001-of-00002.json", 300),
        "/index-00001-of-00002.json: truncated or altered",
    ),
    "a missing index": (
        lambda path: (path / "index-00001-of-00002.json").unlink(),
        "/index-00001-of-00002.json: missing; ",
    ),
    "another rank's index": (
        lambda path: [swap(path, "index-00000-of-00002.json", "index-00001-of-00002.json"), resigned(path)],
        "/index-00000-of-00002.json: does not describe parts as moeport writes them (ValueError('file model-00001",
    ),
    "overlapping parts": (
        lambda path: move(path, [3, 0, 0]),
        f": {EXPERTS}: two parts overlap, [3:7, 0:3, 0:5] in {FIRST} and [4:8, 0:3, 0:5] in {SECOND}{USE}",
    ),
    "a part of another place": (
        lambda path: move(path, [6, 0, 0]),
        f"/{FIRST}: {EXPERTS}: [6:10, 0:3, 0:5] is not a part of an array of shape (8, 3, 5){USE}",
    ),
    "an array without a part": (without_array, f": {EXPERTS}: its parts hold 60 of its 120 entries{USE}"),
    "another shape": (
        lambda path: edit_index(path, lambda index: index["model"][EXPERTS].update(shape=[9, 3, 5])),
        f"{EXPERTS} is F32 of shape (8, 3, 5), but F32 of shape (9, 3, 5) in another index{USE}",
    ),
    "a file outside": (
        lambda path: edit_index(path, lambda index: part(index).update(file="../secret")),
        "/index-00000-of-00002.json: does not describe parts as moeport writes them (ValueError('file ../secret'))",
    ),
    "no parts": (
        lambda path: edit_index(path, lambda index: index["model"][EXPERTS].pop("parts")),
        "/index-00000-of-00002.json: does not describe parts as moeport writes them (KeyError('parts'))",
    ),
    "no index": (
        lambda path: [(path / "index-00000-of-00002.json").write_text("[" * 9), resigned(path)],
        "/index-00000-of-00002.json: not valid JSON",
    ),
    "swapped files": (
        lambda path: [swap(path, FIRST, SECOND), resigned(path)],
        f"/{FIRST}: has no {EXPERTS}[0:4, 0:3, 0:5], which the index lists{USE}",
    ),
    "checksums too few": (
        lambda path: edit_index(path, lambda index: part(index)["crc32"].pop()),
        f"/{FIRST}: {EXPERTS}[0:4, 0:3, 0:5]: the index has 11 checksums of its 12 blocks{USE}",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_by_name(tmp_path, fault):
    path = write(tmp_path, 2)
    damage, message = FAULTS[fault]
    damage(path)
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_the_same_file_of_another_checkpoint_is_refused(tmp_path):
    path = write(tmp_path / "one", 2)
    other = write(tmp_path / "other", 2, model=MODEL | {"norm": MODEL["norm"] + 1})
    shutil.copyfile(other / FIRST, path / FIRST)
    with pytest.raises(CheckpointError) as error:
        dict(open_checkpoint(path).model)
    assert str(error.value) == f"{path / FIRST}: norm: contents do not match their checksum{USE}"


def test_a_damaged_file_of_an_unread_array_is_found_by_verifying(tmp_path):
    path = write(tmp_path, 2)
    dict(open_checkpoint(path).model)
    flip(path, "exp_avg.norm", 0)
    dict(open_checkpoint(path).model)
    with pytest.raises(CheckpointError, match=r"exp_avg\.norm: contents do not match"):
        verify_checkpoint(path)


def test_the_first_checkpoints_in_parts_are_read_and_verified(tmp_path):
    """They list the SHA-256 of each whole file, which opening does not read."""
    path = write(tmp_path, 2)
    resigned(path, file_digest)
    checkpoint = verify_checkpoint(path)
    for name, value in MODEL.items():
        np.testing.assert_array_equal(checkpoint.model[name], value)
    head = read_head(path / FIRST)
    assert head.endswith(b" ")
    data = (path / FIRST).read_bytes()
    (path / FIRST).write_bytes(head[:-1] + b"\t" + data[len(head) :])
    assert sorted(dict(open_checkpoint(path).model)) == sorted(MODEL)
    with pytest.raises(CheckpointError, match=f"{FIRST}: contents do not match their checksum"):
        verify_checkpoint(path)


@pytest.mark.parametrize("kept", [[0], [0, 0], []])
def test_no_checkpoint_is_made_of_parts_that_are_not_every_entry_once(tmp_path, kept):
    """Here the second rank writes nothing of the experts, or what the first one has written, or does not write."""
    folder = start_folder(tmp_path / "step-000007")
    for rank, source in enumerate(kept):
        write_rank(folder, rank, 2, [part_of(shard) for shard in shards(MODEL, source, 2)], [])
    wanted = WriteError if len(kept) < 2 else CheckpointError
    with pytest.raises(wanted, match="rank . has not written" if len(kept) < 2 else "two parts overlap"):
        complete(folder, META, 2, 0.0)
    assert not (folder / "meta.json").exists()


def test_a_rank_that_gives_up_is_not_waited_for(tmp_path):
    folder = start_folder(tmp_path / "step-000007")
    write_rank(folder, 0, 3, [part_of(shard) for shard in shards(MODEL, 0, 2)], [])
    (folder / "model-00002-of-00003.safetensors").write_text("half of it")
    give_up(folder, 2, 3, "the disk is full")
    assert not (folder / "model-00002-of-00003.safetensors").exists()
    with pytest.raises(WriteError, match="rank 2 cannot write its part: the disk is full"):
        complete(folder, META, 3, 1e9)


def test_a_rank_cannot_give_up_what_the_first_rank_may_rely_on(tmp_path):
    """Its index is there, but flushing the folder failed."""
    final = tmp_path / "step-000007"
    folder = start_folder(final)
    for rank in range(2):
        write_rank(folder, rank, 2, *([part_of(shard) for shard in shards(x, rank, 2)] for x in (MODEL, MOMENTS)))
    give_up(folder, 1, 2, "the disk reports an error")
    complete(folder, META, 2, 1.0)
    put_folder(folder, final)
    verify_checkpoint(final)
