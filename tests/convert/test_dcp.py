"""Checkpoints of torch.distributed.checkpoint: there and back, with FSDP2 on ranks, and what is refused."""

import io
import json
import math
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch")

from moeport.backends.dcp import read_dcp
from moeport.backends.torch import dcp as library
from moeport.cli.main import main
from moeport.config import config_from_dict
from moeport.convert.dcp_names import Ours, Theirs, pieces_of
from moeport.convert.digested import Digested
from moeport.convert.from_dcp import from_dcp
from moeport.convert.to_dcp import to_dcp
from moeport.core.moments import moment_names
from moeport.errors import DataError, UserError
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import list_checkpoints, open_checkpoint, save_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.run import train
from moeport.training.run_dir import CONFIG_FILE, read_config, write_config
from tests.comm.jobs import ROOT, Job, start
from tests.convert.dcp_ranks import value_of
from tests.convert.runs import VOCABULARY, config_of
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)
QWEN3 = {
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "norm_eps": 1e-6,
    "dense_hidden": 10,
    "attention": {"qk_norm": True, "head_dim": 6},
    "moe": {"dense_layers": [1]},
}
"""A model that torchtitan's Qwen3-MoE can express."""
DENSE = {**QWEN3, "dense_hidden": None, "moe": {"num_experts": 1, "router": {"name": "topk", "top_k": 1}}}


def specs_of(config):
    return DecoderLM(config.model, VOCABULARY).parameter_specs()


def run_of(folder, model, step=3, data="data", optimizer="adamw"):
    """A run with one checkpoint, whose values follow from their names."""
    config = config_of(folder, model, training={"steps": 9}, optimizer={"name": optimizer})
    specs = specs_of(config)
    params = {spec.name: value_of(spec.name, spec.shape) for spec in specs}
    moments = {name: value_of(name, spec.shape) for name, spec in moment_names(specs, optimizer).items()}
    meta = CheckpointMeta(step, 10, 2.5, "tokens", data, config.model_dump(mode="json"), "0")
    save_checkpoint(folder / "checkpoints", meta, params, moments)
    write_config(folder, config)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def opened(run_dir):
    (path,) = list_checkpoints(run_dir / "checkpoints")
    return open_checkpoint(path)


def same(one, other):
    return list(one) == list(other) and all(
        (one[name].dtype, one[name].tobytes()) == (other[name].dtype, other[name].tobytes()) for name in one
    )


@pytest.mark.parametrize(
    ("names", "model", "tied"),
    [("moeport", QWEN3, True), ("torchtitan", QWEN3, True), ("torchtitan", QWEN3, False), ("torchtitan", DENSE, True)],
)
def test_a_run_comes_back_as_it_was(tmp_path, monkeypatch, names, model, tied):
    monkeypatch.setattr(library, "FILE_BYTES", 1000)  # so that many arrays are in several parts
    run_of(tmp_path / "run", {**model, "tie_embeddings": tied})
    done = to_dcp(tmp_path / "run", tmp_path / "dcp", names)
    assert (done.moments, done.checkpoint.name) == (True, "step-000003")
    back = from_dcp(tmp_path / "dcp", tmp_path / "back")
    assert (back.names, back.resumes, back.notes) == (names, True, ())
    before, after = opened(tmp_path / "run"), opened(tmp_path / "back")
    unused = {} if model is QWEN3 else {name for name in before.model if name.endswith("router.weight")}
    for one, other in ((before.model, after.model), (before.optimizer, after.optimizer)):
        assert list(one) == list(other)
        for name in one:
            wanted = np.zeros_like(one[name]) if any(name.endswith(own) for own in unused) else one[name]
            assert other[name].tobytes() == wanted.tobytes(), name
    assert {**vars(after.meta), "config": 0} == {**vars(before.meta), "config": 0}
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"


def test_a_run_without_the_state_of_its_optimiser_is_one_to_start_from(tmp_path):
    run_of(tmp_path / "run", QWEN3, optimizer="adafactor")
    assert not to_dcp(tmp_path / "run", tmp_path / "dcp").moments
    back = from_dcp(tmp_path / "dcp", tmp_path / "back")
    (note,) = back.notes
    assert (back.resumes, note.partition(":")[0]) == (False, "without the optimiser's state")
    assert read_config(tmp_path / "back").training.start_from == tmp_path / "back"
    assert same(opened(tmp_path / "back").model, opened(tmp_path / "run").model)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """A folder in which two ranks have read and written."""
    folder = tmp_path_factory.mktemp("dcp") / "job"
    run_of(folder.parent / "run", {**QWEN3, "tie_embeddings": True})
    config = config_of(folder, {**QWEN3, "tie_embeddings": True})
    flat = {spec.name: spec.shape for spec in specs_of(config)}
    titan = {piece.tensor: piece.shape for piece in pieces_of("torchtitan", config.model, specs_of(config))}
    to_dcp(folder.parent / "run", folder / "ours")
    (folder / "shapes.json").write_text(json.dumps({"flat": flat, "titan": titan}))
    job = None
    try:
        job = start("torch", 2, [str(ROOT / "tests/convert/dcp_ranks.py"), str(folder)], folder)
        assert (job.wait(200), job.left()) == (0, []), Job.output_of(folder)[-4000:]
    finally:
        if job:
            job.end()
    write_config(folder, config)
    return folder


def test_fsdp2_modules_read_what_is_written_here(of_ranks):
    """The ranks have compared what they read."""
    assert (of_ranks / "flat").is_dir()


@pytest.mark.parametrize("names", ["flat", "titan"])
def test_what_fsdp2_modules_write_is_read_here(of_ranks, tmp_path, names):
    done = from_dcp(of_ranks / names, tmp_path / "run", of_ranks / "config.yaml")
    assert (done.names, done.resumes) == ("moeport" if names == "flat" else "torchtitan", False)
    assert re.match(r"left aside: \d+ tensors of the optimiser and the run \(optim", done.notes[0])
    assert (names == "titan") == any("not tensors (lr" in note for note in done.notes)
    config = config_of(of_ranks, {**QWEN3, "tie_embeddings": True})
    found = opened(tmp_path / "run").model
    for piece in pieces_of(done.names, config.model, specs_of(config)):
        part = found[piece.parameter][piece.box.slices].reshape(piece.shape)
        assert np.array_equal(part, value_of(piece.tensor, piece.shape)), piece.tensor


def test_no_more_than_a_part_is_read_at_once(tmp_path, monkeypatch):
    read: list[int] = []

    def noted(function):
        def inner(self, name, box):
            read.append(4 * box.size)
            return function(self, name, box)

        return inner

    monkeypatch.setattr(library, "FILE_BYTES", 1000)
    monkeypatch.setattr(Theirs, "read", noted(Theirs.read))
    run_of(tmp_path / "run", QWEN3)
    to_dcp(tmp_path / "run", tmp_path / "dcp")
    written, read[:] = max(read), []
    with monkeypatch.context() as patch:
        patch.setattr(Ours, "read", noted(Ours.read))
        from_dcp(tmp_path / "dcp", tmp_path / "back")
    made, read[:] = max(read), []
    monkeypatch.setattr(library.DcpWeights, "read", noted(library.DcpWeights.read))
    from_dcp(tmp_path / "dcp", tmp_path / "again")
    assert 500 < written <= 1000
    assert 500 < made <= 1000
    assert 500 < max(read) <= 1000
    stored, _ = read_dcp(tmp_path / "dcp")
    assert sum(read) == sum(4 * math.prod(stored.shape(name)) for name in stored), "each tensor is read once"


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(1), slice(1, None)])
def test_a_digest_does_not_depend_on_how_an_array_was_read(exported, order):
    stored = Digested(read_dcp(exported)[0])
    for box in stored.bands(EMBEDDING)[order]:
        stored.read(EMBEDDING, box)
    known = json.loads((exported / "moeport-dcp.json").read_text())["sha256"]
    assert stored.digest(EMBEDDING) == known[EMBEDDING]


def test_torch_reads_the_whole_folder(tmp_path):
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    run_of(tmp_path / "run", QWEN3)
    to_dcp(tmp_path / "run", tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "file.pt")
    found = torch.load(tmp_path / "file.pt")
    assert same({k: v.numpy() for k, v in found["model"].items()}, opened(tmp_path / "run").model)


def damaged(folder, change):
    """Change the metadata of a folder."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def lose(name):
    return lambda metadata: metadata.state_dict_metadata.pop(name)


def rename(old, new):
    def change(metadata):
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
        for index in [index for index in metadata.storage_data if index.fqn == old]:
            metadata.storage_data[type(index)(new, index.offset)] = metadata.storage_data.pop(index)

    return change


def swap_experts(metadata):
    own = [index for index in metadata.storage_data if index.fqn == "model.layers.0.moe.experts.w_out"]
    first, second = own[:2]
    places = metadata.storage_data
    places[first], places[second] = places[second], places[first]


def drop_part(metadata):
    metadata.state_dict_metadata["model.embedding.weight"].chunks.pop()


def repeat_part(metadata):
    chunks = metadata.state_dict_metadata["model.embedding.weight"].chunks
    chunks.append(chunks[0])


def outside(metadata):
    place = next(iter(metadata.storage_data.values()))
    place.relative_path = "../somewhere"


EMBEDDING = "model.embedding.weight"
MUTANTS = {
    "a parameter is missing": (lose(EMBEDDING), UserError, f"{EMBEDDING} is missing"),
    "a norm is missing": (lose("model.final_norm.weight"), UserError, "model.final_norm.weight is missing"),
    "a moment is missing": (lose("optim.state.embedding.weight.exp_avg"), UserError, "weight.exp_avg is missing"),
    "a tensor is unknown": (
        rename("model.layers.0.attention.q", "model.layers.0.attention.Q"),
        UserError,
        "layers.0.attention.q is missing",
    ),
    "experts are swapped": (swap_experts, DataError, "experts.w_out is not what was written"),
    "a part is not listed": (drop_part, DataError, f"{EMBEDDING} is incomplete"),
    "a part is listed twice": (repeat_part, DataError, f"{EMBEDDING} has elements at .* that are stored twice"),
    "a path leads elsewhere": (outside, DataError, "the place of .* is not in .metadata"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run_of(folder / "run", QWEN3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FILE_BYTES", 400)  # two experts
        to_dcp(folder / "run", folder / "dcp")
    return folder / "dcp"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_damaged_folder_is_refused_by_name(exported, tmp_path, mutant):
    change, error, message = MUTANTS[mutant]
    shutil.copytree(exported, tmp_path / "dcp")
    damaged(tmp_path / "dcp", change)
    with pytest.raises(error, match=message):
        from_dcp(tmp_path / "dcp", tmp_path / "run")
    assert not (tmp_path / "run/config.yaml").exists()
    assert list_checkpoints(tmp_path / "run/checkpoints") == []


def test_damaged_files_are_refused_by_name(exported, tmp_path):
    files = sorted(exported.glob("*.distcp"))
    for number, (change, message) in enumerate(
        (
            (lambda file: file.write_bytes(file.read_bytes()[:-9]), "cut off within"),
            (lambda file: file.unlink(), "missing; it holds a part of"),
            (lambda file: file.write_bytes(bytes(file.stat().st_size)), "cannot be read"),
        )
    ):
        folder = shutil.copytree(exported, tmp_path / f"dcp{number}")
        change(folder / files[number].name)
        with pytest.raises(DataError, match=message):
            from_dcp(folder, tmp_path / "run")


@pytest.mark.parametrize("module", ["os", "torch.distributed.checkpoint.filesystem"])
def test_code_in_the_metadata_is_not_run(exported, tmp_path, module):
    """A name with dots leads from a module that a checkpoint needs to one that it imports."""
    name = "system" if module == "os" else "os.system"
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    harm = f"touch {tmp_path}/harmed"
    code = b"\x80\x04" + strings + b"\x93\x8c" + bytes([len(harm)]) + harm.encode() + b"\x85R."
    folder = shutil.copytree(exported, tmp_path / "dcp")
    (folder / ".metadata").write_bytes(code)
    with pytest.raises(DataError, match=rf"it names {re.escape(f'{module}.{name}')}, which no checkpoint needs"):
        from_dcp(folder, tmp_path / "run")
    assert not (tmp_path / "harmed").exists()


def test_paths_in_the_metadata_are_those_of_any_python_and_system():
    """Python 3.13 calls their module `pathlib._local`."""
    text = b"(lp0\ncpathlib._local\nPosixPath\n(S'there'\ntRacpathlib\nWindowsPath\n(S'here'\ntRa."
    assert library._Unpickler(io.BytesIO(text)).load() == [pathlib.PurePath("there"), pathlib.PurePath("here")]


def test_a_part_without_elements_is_no_fault(exported, tmp_path):
    """A rank that has no rows of a tensor may list such a part."""

    def change(metadata):
        entry = metadata.state_dict_metadata[EMBEDDING]
        chunk = entry.chunks[0]
        entry.chunks.append(type(chunk)(type(chunk.offsets)((VOCABULARY, 0)), type(chunk.sizes)((0, chunk.sizes[1]))))

    folder = shutil.copytree(exported, tmp_path / "dcp")
    damaged(folder, change)
    assert from_dcp(folder, tmp_path / "run").resumes


def test_values_that_are_not_finite_are_refused(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp

    config = config_of(tmp_path / "x", {"vocab_size": VOCABULARY})
    values = {spec.name: torch.zeros(spec.shape) for spec in specs_of(config)}
    values["final_norm.weight"][3] = float("nan")
    dcp.save({"model": values}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    write_config(tmp_path, config)
    with pytest.raises(DataError, match=r"final_norm\.weight holds a NaN or an infinity"):
        from_dcp(tmp_path / "dcp", tmp_path / "run", tmp_path / CONFIG_FILE)
    assert list_checkpoints(tmp_path / "run/checkpoints") == []


def test_what_torchtitan_lacks_is_refused(tmp_path):
    run_of(tmp_path / "run", {**QWEN3, "moe": {"router": {"name": "sigmoid_bias"}}})
    with pytest.raises(UserError, match=r"qwen3_moe cannot express .* model\.moe\.router\.name is sigmoid_bias"):
        to_dcp(tmp_path / "run", tmp_path / "dcp", "torchtitan")
    assert not (tmp_path / "dcp").exists()


def test_a_bias_of_the_experts_must_be_zero(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp

    config = config_of(tmp_path / "x", QWEN3)
    write_config(tmp_path, config)
    pieces = pieces_of("torchtitan", config.model, specs_of(config))
    values = {piece.tensor: torch.from_numpy(value_of(piece.tensor, piece.shape)) for piece in pieces}
    for number, (value, refused) in enumerate(((0.0, False), (0.5, True))):
        values["layers.0.moe.expert_bias_E"] = torch.full((4,), value)
        dcp.save(values, checkpoint_id=tmp_path / f"dcp{number}", no_dist=True)
        if refused:
            with pytest.raises(UserError, match=r"layers\.0\.moe\.expert_bias_E is not zero"):
                from_dcp(tmp_path / f"dcp{number}", tmp_path / f"run{number}", tmp_path / CONFIG_FILE)
        else:
            from_dcp(tmp_path / f"dcp{number}", tmp_path / f"run{number}", tmp_path / CONFIG_FILE)


def test_a_run_that_was_away_goes_on_as_if_it_had_not(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 2}, checkpoint={"interval": 0})
    train(config, console=QUIET)
    to_dcp(tmp_path / "run", tmp_path / "dcp")
    from_dcp(tmp_path / "dcp", tmp_path / "away")
    ends = []
    for folder in ("run", "away"):
        values = {**config.model_dump(mode="json"), "run": {"dir": str(tmp_path / folder)}}
        train(config_from_dict({**values, "training": {**values["training"], "steps": 4}}), resume=True, console=QUIET)
        ends.append(open_checkpoint(list_checkpoints(tmp_path / folder / "checkpoints")[-1]))
    assert ends[0].meta.step == 4
    assert same(ends[0].model, ends[1].model)
    assert same(ends[0].optimizer, ends[1].optimizer)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["moeport", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        main()
    captured = capsys.readouterr()
    return ending.value.code or 0, captured.out, captured.err


def test_the_commands(tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "run", QWEN3)
    code, out, _ = command(monkeypatch, capsys, "dcp", tmp_path / "run", "-o", tmp_path / "dcp")
    assert (code, "tensors of step-000003" in out, "with the optimiser's state" in out) == (0, True, True)
    code, out, _ = command(monkeypatch, capsys, "from-dcp", tmp_path / "dcp", "-o", tmp_path / "back")
    assert (code, f"resume: moeport train {tmp_path}/back/config.yaml --resume" in out) == (0, True)
    config = config_from_dict(opened(tmp_path / "back").meta.config)
    assert config.model == config_of(tmp_path, QWEN3).model
    (tmp_path / "dcp/moeport-dcp.json").unlink()
    code, _, err = command(monkeypatch, capsys, "from-dcp", tmp_path / "dcp", "-o", tmp_path / "third")
    assert (code, "--config FILE" in err) == (2, True)
    code, _, err = command(monkeypatch, capsys, "from-dcp", tmp_path / "run", "-o", tmp_path / "third")
    assert (code, "has no .metadata" in err) == (2, True)
