"""Files beside the checkpoints: none blocks or misleads, and a resume leaves them as an uninterrupted run does."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from moeport.errors import CheckpointError, DataError
from moeport.training import summarise
from moeport.training.checkpoint import list_checkpoints
from moeport.training.generate import generate
from moeport.training.metrics import MetricsLog, read_metrics
from moeport.training.metrics_repair import Cut
from moeport.training.run import train
from tests.training.metrics_examples import STEP
from tests.training.test_run import comparable, contents
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)
BPE = {"tokenizer": {"name": "bpe", "vocab_size": 300}}
SIDE_FILES = ("config.yaml", "tokenizer.json", "metrics.jsonl", "summary.json", "report.html")


def config_of(folder, rate=0.01, **sections):
    optimizer = {"learning_rate": rate, "schedule": {"name": "constant"}}  # so that a run may become longer
    return tiny_config(folder, data=BPE, metrics={"report": True}, optimizer=optimizer, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which every test gets a copy of."""
    folder = tmp_path_factory.mktemp("finished")
    train(config_of(folder), console=QUIET)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    config = config_of(tmp_path)
    return config.model_copy(update={"data": config_of(finished).data})


def test_the_summary_has_the_commit_that_was_started_last(finished):
    folder = config_of(finished).run.dir
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert json.loads((folder / "summary.json").read_text())["commit"] == starts[-1]["commit"]


def state(run_dir):
    """What a run leaves, without times."""
    summary = json.loads((run_dir / "summary.json").read_text())
    timed = (
        "tokens_per_second",
        "wall_time",
        "save_time",
        "peak_memory",
        "run_dir",
        "checkpoint",
        "versions",
        "commit",
    )
    report = (run_dir / "report.html").read_text()
    return {
        "summary": {name: value for name, value in summary.items() if name not in timed},
        "metrics": [comparable(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()],
        "headings": re.findall(r"<h[123][^>]*>([^<]*)", report)[1:],
        "tokenizer": (run_dir / "tokenizer.json").read_bytes(),
        "weights": contents(list_checkpoints(run_dir / "checkpoints")[-1]),
    }


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\x01" * 50),
    "another kind": lambda path: path.write_text('{"a": [1, {"b": null}]}'),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "deep": lambda path: path.write_text("[" * 100_000),
}
USUAL = ("missing", "cut")
EVERY = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]


@pytest.mark.parametrize("names", [USUAL, pytest.param(tuple(DAMAGES), marks=pytest.mark.slow)], ids=["usual", "all"])
@pytest.mark.parametrize("name", [name for name in SIDE_FILES if name != "metrics.jsonl"])
def test_a_damaged_side_file_neither_blocks_nor_misleads_a_finished_run(run, capsys, name, names):
    before = state(run.run.dir)
    for damage in names:
        DAMAGES[damage](run.run.dir / name)
        train(run, resume=True, console=Console(width=400))
        out = capsys.readouterr().out
        assert re.search(rf"^{run.run.dir}/{re.escape(name)}:.*; it is written again$", out, re.MULTILINE), out
        assert state(run.run.dir) == before
    assert train(run, resume=True, console=Console(width=400)).steps == 6
    assert capsys.readouterr().out == f"{run.run.dir} is finished: all 6 steps are done\n"


def test_files_of_another_run_do_not_mislead_a_finished_run(run, tmp_path, capsys):
    other = config_of(tmp_path, rate=0.02, run={"dir": str(tmp_path / "other")})
    other = other.model_copy(update={"data": run.data})
    train(other, console=QUIET)
    before = state(run.run.dir)
    for name in ("config.yaml", "summary.json"):
        shutil.copy(other.run.dir / name, run.run.dir / name)
        train(run, resume=True, console=Console(width=400))
        assert re.search(rf"^{run.run.dir}/{name}: is not the .*; it is written again$", capsys.readouterr().out, re.M)
        assert state(run.run.dir) == before
    (run.run.dir / "tokenizer.json").write_text((run.run.dir / "tokenizer.json").read_text() + " ")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not the tokenizer that .*step-000006 was trained with; "):
        generate(run.run.dir, "x")
    train(run, resume=True, console=QUIET)
    assert state(run.run.dir) == before


@pytest.mark.parametrize("damage", EVERY)
def test_text_is_generated_without_any_side_file_but_the_tokenizer(run, damage):
    want = generate(run.run.dir, "x", max_tokens=4, temperature=0)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        DAMAGES[damage](run.run.dir / name)
    assert generate(run.run.dir, "x", max_tokens=4, temperature=0) == want
    DAMAGES[damage](run.run.dir / "tokenizer.json")
    with pytest.raises(
        DataError, match=r"tokenizer\.json: .*; restore it, or write it again with moeport train CONFIG"
    ):
        generate(run.run.dir, "x")


def test_bytes_need_no_tokenizer_file(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 1})
    train(config, console=QUIET)
    (config.run.dir / "tokenizer.json").unlink()
    assert isinstance(generate(config.run.dir, "x", max_tokens=2), str)


@pytest.mark.parametrize("damage", EVERY)
def test_lost_metrics_do_not_stop_a_run(run, capsys, damage):
    path = run.run.dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    DAMAGES[damage](path)
    longer = run.model_copy(update={"training": run.training.model_copy(update={"steps": 8})})
    train(longer, resume=True, console=Console(width=400))
    out = capsys.readouterr().out
    kept = 4 if damage == "cut" else 0
    found = [comparable(line) for line in path.read_text().splitlines()]
    assert found[:kept] == [comparable(line) for line in lines[:kept]]
    assert [(r["step"], "val_loss" in r) for r in found[kept:]] == [(7, False), (8, False), (8, True)]
    assert re.search(rf"{path}: has no records of steps {'4' if kept else '1'}-6; summary and report are without", out)
    assert (run.run.dir / "report.html").exists()


def write_metrics(folder, *steps):
    with MetricsLog(folder, None) as log:
        for step in steps:
            log.step(replace(STEP, step=step))
    return folder / "metrics.jsonl"


def test_what_is_no_record_and_what_stands_twice_is_left_out_and_kept_aside(tmp_path):
    path = write_metrics(tmp_path, 1, 2, 3)
    whole = path.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    other = first.replace(b'"loss":8.3', b'"loss":9.9')
    evaluation = b'{"step":2,"val_loss":1.5}\n'
    foreign = b'{"step":true}\n[1]\n{"step":1,"loss":"x"}\nnot JSON\n{"step":0,"skipped":true}\n\xff\n'
    dirty = third + other + foreign + second + evaluation + first + evaluation + b'{"step":4,"lo'
    path.write_bytes(dirty)
    cut = Cut(path, 2)
    assert path.read_bytes() == first + second + evaluation
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == dirty
    assert cut.evaluated
    assert cut.notes == [
        f"{path}: left out 6 lines that are not records and 2 duplicate records; the file as it was is "
        f"{tmp_path}/metrics.damaged.jsonl"
    ]
    path.write_bytes(second + first)
    assert Cut(path, 3).notes == [
        f"{path}: sorted the records; the file as it was is {tmp_path}/metrics.damaged2.jsonl",
        f"{path}: has no records of steps 3; summary and report are without them",
    ]
    assert path.read_bytes() == first + second


def test_a_partial_last_line_and_later_steps_go_silently(tmp_path):
    path = write_metrics(tmp_path, 1, 2, 3)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + b'{"step":4')
    assert Cut(path, 2).notes == []
    assert path.read_bytes() == b"".join(whole[:2])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is not a metrics record: expected an object"),
        ('{"step": "1"}', 'is not a metrics record: step is "1", expected an integer of at least 1'),
        ('{"step": 1, "val_loss": "x"}', 'val_loss is "x", expected a number'),
        ('{"step": 1, "val_loss": [1]}', "val_loss is [1], expected a number"),
        ('{"step": 1, "val_loss": 1, "val_accuracy": true}', "val_accuracy is true, expected a number"),
    ],
)
def test_records_of_wrong_types_are_refused_with_their_line(tmp_path, line, message):
    path = write_metrics(tmp_path, 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as error:
        read_metrics(path)
    assert str(error.value) == f"{path}:2: {message}"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["write_json", "write_report", "find_checkpoint"])
def test_a_kill_at_the_end_leaves_nothing_undone_or_doubled(finished, tmp_path, monkeypatch, moment):
    config = config_of(tmp_path).model_copy(update={"data": config_of(finished).data})

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(summarise, moment, killed)
        with pytest.raises(Killed):
            train(config, console=QUIET)
    for _ in range(2):
        train(config, resume=True, console=QUIET)
        assert state(config.run.dir) == state(config_of(finished).run.dir)


def test_a_continued_run_is_not_finished_until_it_is(run, monkeypatch):
    """Summary and report of the shorter run are gone as soon as it goes on, so that nothing takes it for finished."""

    def killed(*arguments):
        raise Killed

    longer = run.model_copy(update={"training": run.training.model_copy(update={"steps": 8})})
    with monkeypatch.context() as patch:
        patch.setattr(summarise, "write_json", killed)
        with pytest.raises(Killed):
            train(longer, resume=True, console=QUIET)
    assert not (run.run.dir / "summary.json").exists()
    assert not (run.run.dir / "report.html").exists()
    assert train(longer, resume=True, console=QUIET).steps == 8


def damage_checkpoint(path):
    file = path / "optimizer-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_newest_checkpoint_is_refused_with_the_way_back(run):
    folder = run.run.dir / "checkpoints"
    paths = list_checkpoints(folder)
    longer = run.model_copy(update={"training": run.training.model_copy(update={"steps": 8})})
    before = state(run.run.dir)
    damage_checkpoint(paths[-1])
    damage_checkpoint(paths[-2])
    with pytest.raises(CheckpointError) as error:
        train(longer, resume=True, console=QUIET)
    assert str(error.value).startswith(
        f"{paths[-1]}/optimizer-00000-of-00001.safetensors: truncated or altered: expected "
    )
    assert str(error.value).endswith(
        f"; use another checkpoint. To continue from {paths[-3].name}, the newest good one, delete {paths[-2]}, "
        f"{paths[-1]} or move it to another folder"
    )
    assert [path.name for path in list_checkpoints(folder)] == [path.name for path in paths], "nothing is deleted"
    for path in paths[-2:]:
        shutil.rmtree(path)
    train(run, resume=True, console=QUIET)
    assert state(run.run.dir) == before
    for path in list_checkpoints(folder):
        damage_checkpoint(path)
    with pytest.raises(CheckpointError, match=rf"No checkpoint in {folder} is good; start another run with --set run"):
        train(longer, resume=True, console=QUIET)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_all_files_of_a_run_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        train(config_of(tmp_path, training={"steps": 1}), console=QUIET)
    finally:
        os.umask(before)
    for root in (tmp_path / "run", tmp_path / "cache"):
        for path in root.rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
