"""The processes of a part may fail, hang, or be ended by a signal."""

import os
import sys
import time
from pathlib import Path

import pytest

from moeport.kit import supervise
from moeport.kit.supervise import MAX_CRASHES, Watch, log_of, run_stage
from moeport.kit.task import Task
from moeport.launch.launcher import NodeProcess

START = """
import json, os, signal, sys, time
folder = os.getcwd()
task = json.load(open("task.json"))
def event(value):
    with open("events.jsonl", "a") as file:
        file.write(json.dumps(value) + "\\n")
def done(value):
    with open("value.json", "w") as file:
        json.dump(value, file)
"""


def task(folder, ranks=1, **changes):
    return Task("kernels", 0, "torch", "cpu", ("float32",), ranks, ranks, True, str(folder), **changes)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script in place of the process of a part."""

    def go(script, seconds=60.0, cases=False, watch=None, ranks=1):
        command = [sys.executable, "-c", START + script]
        processes = [NodeProcess(0, command, {"RANK": str(rank)}) for rank in range(ranks)]
        monkeypatch.setattr(supervise, "_processes", lambda task: processes)
        return run_stage(task(tmp_path, ranks), seconds, cases, watch or Watch())

    return go


def test_a_stage_that_is_done_leaves_its_value(run, tmp_path):
    outcome = run("event({'end': 'a'}); print('said'); done([1, 2])")
    assert (outcome.value, outcome.ending, outcome.events) == ([1, 2], None, [{"end": "a"}])
    assert "said" in log_of(tmp_path)


ENDINGS = {
    "exit": ("sys.stderr.write('before\\nerror: no device\\nafter\\n'); sys.exit(3)", "exit code 3: error: no device"),
    "exception": ("raise ValueError('bad')", "exit code 1: ValueError: bad"),
    "SIGABRT": ("os.abort()", "SIGABRT"),
    "SIGSEGV": ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "no value": ("print('I forgot')", "exit code 0: I forgot"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_a_stage_that_ends_early_says_how(run, case):
    script, said = ENDINGS[case]
    outcome = run(script)
    assert (outcome.value, outcome.ending) == (None, f"ended with {said}")


def test_a_stage_that_hangs_is_ended(run, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.2)
    start = time.monotonic()
    outcome = run("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", seconds=2.0)
    assert outcome.ending == "no end within 2 s"
    assert time.monotonic() - start < 60


def test_a_rank_that_fails_is_named(run):
    script = """
os.makedirs("came", exist_ok=True)
try:
    os.mkdir("came/first")
except FileExistsError:
    sys.exit("error: second")
"""
    outcome = run(script, ranks=2)
    assert outcome.ending in [f"rank {rank} of 2 ended with exit code 1: error: second" for rank in (0, 1)]


def test_a_rank_that_fails_counts_although_another_has_left_its_value(run):
    """As one that alone has received a wrong value."""
    outcome = run("sys.exit('error: wrong value') if os.environ['RANK'] == '1' else done(1)", ranks=2)
    assert outcome.ending == "rank 1 of 2 ended with exit code 1: error: wrong value"


CASES = """
labels = ["a", "b", "c", "d"]
after = task["after"]
for label in labels[labels.index(after) + 1 if after else 0:]:
    event({"begin": label})
    if label in %r:
        os.abort()
    event({"end": label})
done(len(labels))
"""


def test_after_a_case_that_ends_the_process_the_next_one_is_tried(run):
    outcome = run(CASES % (["b", "d"],), cases=True)
    assert [event["end"] for event in outcome.events if "end" in event] == ["a", "c"]
    assert [(crash.label, crash.ending) for crash in outcome.crashes] == [
        ("b", "ended with SIGABRT"),
        ("d", "ended with SIGABRT"),
    ]
    assert outcome.ending is None
    assert outcome.value == 4


def test_too_many_such_cases_end_the_part(run, tmp_path):
    script = "event({'begin': str(len(os.listdir('.')))}); os.abort()"
    outcome = run(script, cases=True)
    assert len(outcome.crashes) == MAX_CRASHES
    assert outcome.ending == "ended with SIGABRT"


def test_an_interruption_ends_the_processes_at_once(run, tmp_path):
    script = "open('pid', 'w').write(str(os.getpid())); event({'end': 'a'}); time.sleep(600)"
    watch = Watch(interrupted=lambda: (tmp_path / "events.jsonl").is_file())
    outcome = run(script, watch=watch, cases=True)
    assert (outcome.ending, outcome.events) == ("interrupted", [{"end": "a"}])
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_line_that_was_cut_short_is_left_out(run):
    assert run("open('events.jsonl', 'w').write('{\"end\": 1}\\n{\"end'); done(1)").events == [{"end": 1}]


def test_long_output_is_cut(run, tmp_path):
    run("print('first'); print('x' * 200_000); print('last'); done(1)")
    text = log_of(tmp_path)
    assert "first" in text
    assert "last" in text
    assert "bytes left out" in text
    assert len(text) < 40_000


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_processes_find_moeport_wherever_they_run(tmp_path, monkeypatch, ranks):
    """Also where the user has set relative paths."""
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.setattr("sys.path", ["", ".", *sys.path])
    for process in supervise._processes(task(tmp_path, ranks=ranks)):
        assert process.command[-4:] == ["moeport", "kit", "part", str(tmp_path)]
        paths = process.environment["PYTHONPATH"].split(os.pathsep)
        assert paths[0] == os.getcwd()
        assert all(Path(entry).is_absolute() for entry in paths)
