"""One run at a time trains in a folder, and a dead one blocks nobody."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from rich.console import Console

from moeport.errors import DataError, UserError
from moeport.training import lock as module
from moeport.training.checkpoint import list_checkpoints
from moeport.training.lock import RunLock, refuse_locked
from moeport.training.run import train
from tests.faults.runs import NOTHING, Try
from tests.faults.runs import config as config_file
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)


def quiet(text):
    pass


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)


def write_lock(run_dir, **changes):
    run_dir.mkdir(exist_ok=True)
    holder = {**vars(module._this_process()), **changes}
    (run_dir / ".lock").write_text(json.dumps(holder) + "\n")


def age(path, seconds):
    past = time.time() - seconds
    os.utime(path, (past, past))


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_run_in_a_folder_is_refused_with_the_first_named(tmp_path):
    file, run_dir = config_file(tmp_path, training={"evaluation_interval": 0}), tmp_path / "run"
    command = ["train", file, "--set", "checkpoint.interval=50", "--set", "optimizer.schedule.name=constant"]
    first = Try(NOTHING, [*command, "--set", "training.steps=1000000"], tmp_path / "first")
    first.wait_for(lambda: list_checkpoints(run_dir / "checkpoints"))
    before = (run_dir / ".lock").read_text()
    for options in ((), ("--resume",)):
        second = Try(NOTHING, [*command, *options], tmp_path / f"second{len(options)}")
        assert second.wait() == 2
        assert re.fullmatch(
            rf"error: run\.dir: {run_dir} is in use by process {first.process.pid} on host {socket.gethostname()} "
            rf"since \S+ \S+ \S+; wait until it has ended or stop it, or choose another folder with --set "
            rf"run\.dir=FOLDER \(if there is no such process, delete {run_dir}/\.lock\)",
            " ".join(second.said().split()),
        )
    assert (run_dir / ".lock").read_text() == before
    assert first.process.poll() is None
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait()
    assert (run_dir / ".lock").exists(), "a killed process leaves its lock"
    steps = int(list_checkpoints(run_dir / "checkpoints")[-1].name.removeprefix("step-")) + 1
    third = Try(NOTHING, [*command, "--resume", "--set", f"training.steps={steps}"], tmp_path / "third")
    assert (third.wait(), "waiting" in third.said()) == (0, False), third.said()
    assert not (run_dir / ".lock").exists()


def test_a_run_that_ends_unlocks_its_folder_however_it_ends(tmp_path):
    train(tiny_config(tmp_path, training={"steps": 1}), console=QUIET)
    assert not (tmp_path / "run/.lock").exists()
    (tmp_path / "text/0.txt").write_text("other text\n" * 99)
    with pytest.raises(UserError, match="was trained on other text"):
        train(tiny_config(tmp_path, training={"steps": 2}), resume=True, console=QUIET)
    assert not (tmp_path / "run/.lock").exists()


def test_a_dry_run_takes_no_lock(tmp_path):
    write_lock(tmp_path / "run")
    train(tiny_config(tmp_path), dry_run=True, console=QUIET)


def test_a_refused_run_leaves_no_folder_behind(tmp_path, monkeypatch):
    def refused(lock):
        raise UserError("x")

    monkeypatch.setattr(RunLock, "_acquire", refused)
    with pytest.raises(UserError), RunLock(tmp_path / "new", quiet):
        pass
    assert not (tmp_path / "new").exists()


def test_a_run_that_fails_before_it_begins_leaves_no_folder_behind(tmp_path):
    with pytest.raises(DataError, match="matches"):
        train(tiny_config(tmp_path, data={"source": {"name": "files", "paths": ["none/*.txt"]}}), console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        lambda: {"pid": dead_pid()},
        lambda: {"started": "1"},
        lambda: {"pid": 2**40},
    ],
    ids=["ended", "another process has its number", "impossible"],
)
def test_the_lock_of_a_dead_process_of_this_host_is_taken_at_once(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    write_lock(tmp_path, **changes())
    refuse_locked(tmp_path)
    with RunLock(tmp_path, quiet) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_zombie_is_dead(tmp_path):
    process = subprocess.Popen(["sleep", "1000"])
    write_lock(tmp_path, pid=process.pid, started=module._started(process.pid))
    with pytest.raises(UserError, match=f"in use by process {process.pid} on host "):
        refuse_locked(tmp_path)
    process.kill()
    while module._started(process.pid):
        time.sleep(0.01)
    with RunLock(tmp_path, quiet):
        pass
    process.wait()


ELSEWHERE = [
    {"host": "node7", "machine": "other 1"},
    {"machine": "the same host after a restart"},
    {"machine": ""},
]


@pytest.mark.parametrize("changes", ELSEWHERE)
def test_the_lock_of_a_silent_process_elsewhere_is_taken_once_it_was_silent_long_enough(tmp_path, fast, changes):
    said = []
    write_lock(tmp_path, **changes)
    refuse_locked(tmp_path)
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1
    assert said[0].startswith("waiting for a sign of life, at most 0 s: ")
    write_lock(tmp_path, **changes)
    age(tmp_path / ".lock", 1000)
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1, "silent for long already"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "1"}', "[" * 100_000, "\0"])
def test_a_lock_that_says_nothing_is_that_of_a_process_elsewhere(tmp_path, fast, text):
    (tmp_path / ".lock").write_text(text)
    with RunLock(tmp_path, quiet) as lock:
        assert lock.is_held


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere"), os.mkfifo])
def test_what_cannot_be_read_as_a_lock_is_put_aside_after_a_while(tmp_path, fast, make):
    make(tmp_path / ".lock")
    with RunLock(tmp_path, quiet) as lock:
        lock.check()


def test_a_process_elsewhere_that_gives_a_sign_of_life_keeps_its_lock(tmp_path, fast, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 60.0)
    with RunLock(tmp_path, quiet) as held:
        text = held.path.read_text()
        monkeypatch.setattr(module.Holder, "runs", None)
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on host "), RunLock(tmp_path, quiet):
            pass
        assert held.path.read_text() == text
        held.check()


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    write_lock(tmp_path, pid=dead_pid())
    barrier, holders, refused = threading.Barrier(8), [], []

    def contend():
        barrier.wait()
        try:
            with RunLock(tmp_path, quiet) as lock:
                lock.check()
                holders.append(lock)
                while len(refused) < 7:
                    time.sleep(0.01)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(holders), len(refused)) == (1, 7)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_taken_meanwhile_is_put_back(tmp_path):
    write_lock(tmp_path, host="node7")
    text = (tmp_path / ".lock").read_text()
    RunLock(tmp_path, quiet)._take_over("the text of a lock that was here before")
    assert (tmp_path / ".lock").read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_locks_work_where_there_are_no_hard_links(tmp_path, monkeypatch, links):
    def unsupported(*arguments):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    with RunLock(tmp_path, quiet) as lock:
        lock.check()
        with pytest.raises(UserError, match="is in use by"), RunLock(tmp_path, quiet):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [True, False])
def test_a_run_whose_lock_was_taken_stops_before_it_saves(tmp_path, monkeypatch, taken):
    config = tiny_config(tmp_path, training={"evaluation_interval": 0}, checkpoint={"interval": 3})
    original = RunLock.check

    def check(lock):
        (lock.path.unlink, lambda: write_lock(config.run.dir, host="node7"))[taken]()
        original(lock)

    monkeypatch.setattr(RunLock, "check", check)
    with pytest.raises(UserError) as error:
        train(config, console=QUIET)
    how = f"was taken over by process {os.getpid()} on host node7 since " if taken else "is gone, so"
    assert f"run.dir: the lock {config.run.dir}/.lock {how}" in str(error.value)
    assert list((config.run.dir / "checkpoints").iterdir()) == []
    assert (config.run.dir / ".lock").exists() == taken


def test_a_run_that_another_finished_while_it_started_is_not_overwritten(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    original = RunLock.__enter__

    def late(lock):
        monkeypatch.undo()
        train(config, console=QUIET)
        return original(lock)

    monkeypatch.setattr(RunLock, "__enter__", late)
    with pytest.raises(UserError, match=r"another process has trained in .*; repeat the command"):
        train(config, console=QUIET)
    assert (config.run.dir / "summary.json").exists()


def test_two_processes_that_prepare_one_cache_at_once_both_succeed(tmp_path):
    file = config_file(tmp_path, data={"tokenizer": {"name": "bpe", "vocab_size": 300}}, training={"steps": 1})
    names = ("a", "b")
    runs = [
        Try(NOTHING, ["train", file, "--set", f"run.dir={tmp_path / name}"], tmp_path / f"{name}.log") for name in names
    ]
    for run in runs:
        assert run.wait() == 0, run.said()
    (entry,) = (tmp_path / "cache").iterdir()
    assert not list(entry.glob(".*"))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
