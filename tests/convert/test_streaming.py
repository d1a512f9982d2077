"""Memory of a conversion, and files that are written a block at a time."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from moeport.convert.from_hf import from_hf
from moeport.convert.to_hf import to_hf
from moeport.core.weights import run_boxes
from moeport.training.checkpoint import list_checkpoints, open_checkpoint, save_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.tensor_file import NewTensor, read_header, write_tensors
from tests.convert.folders import config_of, values_of, write
from tests.support import rng

LARGEST = 4 * 8 * 2**19
"""Bytes of the largest parameter, the embedding."""


def peak(function, *arguments, **options):
    tracemalloc.start()
    try:
        function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_below_one_and_a_half_times_the_largest_tensor(tmp_path):
    config = config_of("mixtral", vocab_size=2**19, tie_word_embeddings=True)
    values = {name: value.astype(np.float16) for name, value in values_of(config).items()}
    write(tmp_path / "hub", config, values, tokenizer=False)
    del values
    used = peak(from_hf, tmp_path / "hub", tmp_path / "run", without_tokenizer=True)
    back = peak(to_hf, tmp_path / "run", tmp_path / "back")
    assert max(used, back) < 1.5 * LARGEST
    assert (tmp_path / "run/checkpoints/step-000000/model-00000-of-00001.safetensors").stat().st_size > LARGEST


def halves(x):
    data = x.tobytes()
    return [data[:8], data[8:]]


def test_a_streamed_file_is_one_of_safetensors(tmp_path):
    values: dict[str, np.ndarray] = {
        "b": rng(1).standard_normal((3, 4)).astype(np.float32),
        "a": rng(2).standard_normal(5),
        "none": np.ones((0, 2)),
    }
    codes = {"float32": "F32", "float64": "F64"}
    tensors = [NewTensor(name, codes[x.dtype.name], x.shape, partial(halves, x)) for name, x in values.items()]
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert (read[name].dtype, read[name].tobytes()) == (value.dtype, value.tobytes())
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    stored = read_header(tmp_path / "x.safetensors")
    assert b"".join(stored["b"].blocks(2, 5)) == values["b"].tobytes()[8:28]
    with pytest.raises(AssertionError, match="a: 8 bytes of 40"):
        write_tensors(tmp_path / "y.safetensors", [NewTensor("a", "F64", (5,), lambda: [bytes(8)])])


def test_checkpoints_are_opened_as_they_were_saved(tmp_path):
    model = {"x": rng(1).standard_normal((3, 4)).astype(np.float32)}
    save_checkpoint(tmp_path, CheckpointMeta(3, 1, None, None, "d", {}, "0"), model, {})
    (path,) = list_checkpoints(tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.meta.step == 3
    assert checkpoint.model["x"].tobytes() == model["x"].tobytes()
    (run,) = checkpoint.model.run("x", 5, 3)
    assert run.tobytes() == model["x"].tobytes()[20:32]


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4), (2, 1, 5), (3, 4, 2, 2)])
def test_runs_are_cut_into_parts_of_whole_rows(shape):
    whole = np.arange(np.prod(shape)).reshape(shape)
    for start in range(whole.size):
        for count in range(1, whole.size - start + 1):
            boxes = list(run_boxes(shape, start, count, most=4))
            assert max(box.size for box in boxes) <= 4
            found = np.concatenate([whole[box.slices].reshape(-1) for box in boxes])
            assert found.tolist() == list(range(start, start + count))
