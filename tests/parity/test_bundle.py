"""Bundles: complete, bit-identical, and refused when damaged."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moeport.parity import bundle
from moeport.parity.bundle import MANIFEST_FILE, TENSORS_FILE, BundleError, load_bundle, save_bundle
from moeport.parity.compare import compare
from moeport.parity.record import record
from moeport.parity.recording import EVERYTHING, SAMPLED, STATISTICS, Recording, TensorRecord
from tests.parity.tiny import subject


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    taken = subject(folder, "torch-cpu:bf16")
    keeps = {"full": EVERYTHING, "sampled": SAMPLED, "statistics": STATISTICS}
    return {name: record(taken, steps=2, keep=keep, sample_size=64) for name, keep in keeps.items()}


@pytest.mark.parametrize("name", ["full", "sampled", "statistics"])
def test_what_is_read_is_what_was_written(recordings, name, tmp_path):
    recording = recordings[name]
    save_bundle(recording, tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle")
    assert list(loaded.tensors) == list(recording.tensors)
    for key, tensor in recording.tensors.items():
        again = loaded.tensors[key]
        for field in ("name", "kind", "dtype", "shape", "layer", "op", "inputs", "keep", "statistics"):
            assert getattr(again, field) == getattr(tensor, field), key
        if tensor.values is None:
            assert again.values is None
        else:
            assert again.values.shape == tensor.values.shape
            np.testing.assert_array_equal(again.values, tensor.values, err_msg=key)
    for field in ("name", "dtype", "trajectory", "environment", "replayed", "sample_size", "notes"):
        assert getattr(loaded, field) == getattr(recording, field)
    if name != "statistics":
        assert compare(recording, loaded).equal


def test_an_older_bundle_is_read_and_what_it_lacks_is_not_judged(recordings, tmp_path, monkeypatch):
    new = recordings["sampled"]
    known = {n: t for n, t in new.tensors.items() if t.kind not in ("moment", "state", "second step")}
    monkeypatch.setattr(bundle, "FORMAT_VERSION", 1)
    save_bundle(replace(new, name="old", tensors=known), tmp_path / "old")
    monkeypatch.undo()
    assert json.loads((tmp_path / "old" / MANIFEST_FILE).read_text())["format_version"] == 1
    old = load_bundle(tmp_path / "old")
    assert compare(old, old).verdict == "pass"
    found = compare(old, new)
    assert found.verdict == "warn"
    assert "optimizer not compared (" in found.headline
    assert "only B has exp_avg:" in found.headline


def test_statistics_alone_are_no_pass(recordings):
    found = compare(recordings["full"], recordings["statistics"])
    assert found.verdict == "warn"
    assert "by mean and RMS only, which cannot show that they agree" in found.headline


def test_two_bundles_of_a_run_are_the_same_bytes(recordings, tmp_path):
    subject_again = subject(tmp_path, "torch-cpu:bf16")
    for name in ("a", "b"):
        save_bundle(record(subject_again, steps=1, keep=SAMPLED), tmp_path / name)
    for file in (MANIFEST_FILE, TENSORS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bfloat16_takes_two_bytes_an_entry(tmp_path):
    values = np.arange(1000, dtype=np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    recording = Recording("x", "bfloat16", {"x": TensorRecord("x", "activation", "bfloat16", (1000,), values=values)})
    save_bundle(recording, tmp_path / "b")
    assert (tmp_path / "b" / TENSORS_FILE).stat().st_size < 2300
    np.testing.assert_array_equal(load_bundle(tmp_path / "b").tensors["x"].values, values)


@pytest.mark.parametrize("file", [MANIFEST_FILE, TENSORS_FILE])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_refused(recordings, tmp_path, file, place):
    save_bundle(recordings["sampled"], tmp_path / "b")
    path = tmp_path / "b" / file
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"checksum|not valid JSON|not written by moeport|format version"):
        load_bundle(tmp_path / "b")


def test_a_truncated_file_is_refused(recordings, tmp_path):
    save_bundle(recordings["sampled"], tmp_path / "b")
    path = tmp_path / "b" / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="truncated or altered: expected"):
        load_bundle(tmp_path / "b")
    path.unlink()
    with pytest.raises(BundleError, match="missing; the bundle is incomplete"):
        load_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a parity bundle: it has no manifest.json"),
        ("{", "not valid JSON"),
        ("{}", 'expected "format": "moeport-parity-bundle"'),
        ('{"format": "moeport-parity-bundle", "format_version": 99}', "format version 99"),
    ],
)
def test_what_is_no_bundle_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path)


def test_other_files_are_not_overwritten(recordings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="holds other files"):
        save_bundle(recordings["sampled"], tmp_path)


def test_the_manifest_says_what_and_where(recordings, tmp_path):
    save_bundle(recordings["sampled"], tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / MANIFEST_FILE).read_text())
    assert manifest["environment"]["versions"]["torch"]
    assert manifest["environment"]["kernels"]["attention"]
    assert manifest["config"]["model"]["d_model"] == 32
    assert {entry["keep"] for entry in manifest["tensors"]} == {"full", "sample"}
