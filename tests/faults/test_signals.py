"""Every signal that asks for an end saves a run, and leaves nothing half-written before the run."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from moeport.stopping import SIGNALS, install, restore
from moeport.training.checkpoint import list_checkpoints
from moeport.training.signals import StopRequest
from tests.faults.runs import NOTHING, Try, config, lines, litter

pytest.importorskip("torch")
ENDLESS = {"training": {"steps": 10**6, "evaluation_interval": 0}, "checkpoint": {"interval": 0}}


def mostly_slow(values, quick):
    """Parameters of which all but a few run in `make test-all` alone."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    "number", mostly_slow(SIGNALS, [signal.SIGHUP, signal.SIGUSR1]), ids=lambda number: signal.Signals(number).name
)
def test_every_signal_saves_the_last_step(tmp_path, number):
    run = Try(NOTHING, ["train", config(tmp_path, **ENDLESS)], tmp_path / "log")
    run.wait_for(lambda: lines(tmp_path) > 2)
    os.kill(run.process.pid, number)
    assert run.wait() == 130, run.said()
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == f"step-{lines(tmp_path):06d}"
    assert "Continue with the same command and --resume" in run.said()
    assert litter(tmp_path) == []


@pytest.mark.parametrize("at", mostly_slow([1, 4, 10], [4]))
@pytest.mark.parametrize("number", mostly_slow(["SIGTERM", "SIGINT"], ["SIGTERM"]))
def test_a_signal_before_the_run_leaves_nothing_half_written(tmp_path, number, at):
    fault = {"do": number, "under": str(tmp_path / "cache"), "at": at}
    run = Try(fault, ["train", config(tmp_path, **ENDLESS)], tmp_path / "log")
    assert run.wait() == 130, run.said()
    assert run.said().rstrip().endswith(f"error: interrupted by {number}")
    assert (litter(tmp_path), (tmp_path / "run" / "metrics.jsonl").exists()) == ([], False)


def test_a_second_signal_ends_a_run_that_is_stuck_in_a_library(tmp_path):
    run = Try({"do": "stuck"}, ["train", config(tmp_path, **ENDLESS)], tmp_path / "log")
    run.wait_for(lambda: "stuck" in run.said())
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert run.process.poll() is None
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait(20) == 130


STUCK = """
import ctypes, sys
from moeport.stopping import Interruptible
with Interruptible(grace=0.2):
    lock = ctypes.create_string_buffer(128)
    print("stuck", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


def test_a_command_that_does_not_end_by_itself_is_ended():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(1)  # it says that it is stuck just before it is
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 130


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
            signal.raise_signal(signal.SIGUSR1)
            assert stop
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def no_signal_is_ignored():
    """As in a terminal: a shell without job control starts what it runs in the background with SIGINT ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    restore(before)


@pytest.mark.usefixtures("no_signal_is_ignored")
def test_what_a_launcher_repeats_is_one_signal(monkeypatch):
    heard, now = [], [0.0]
    monkeypatch.setattr("moeport.training.signals.time", SimpleNamespace(monotonic=lambda: now[-1]))
    before = install(lambda number, frame: heard.append(number))
    try:
        with StopRequest(repeats_within=0.2) as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert (bool(stop), heard) == (True, [])
            now.append(0.25)
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert (bool(stop), heard) == (True, [signal.SIGTERM])
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGTERM, signal.SIGINT]
    finally:
        restore(before)


def test_a_closed_output_does_not_end_training(tmp_path):
    run = Try({"do": "closed"}, ["train", config(tmp_path)], tmp_path / "log")
    assert run.wait() == 0, run.said()
    assert run.said() == "standard output is closed (Broken pipe); the command goes on without it\n"
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    "command", mostly_slow([["config", "schema"], ["train", "--help"], ["routers"], ["--help"]], [["train", "--help"]])
)
def test_other_commands_end_quietly_with_their_reader(tmp_path, command):
    run = Try({"do": "closed"}, command, tmp_path / "log")
    assert (run.wait(), run.said()) == (141, "")


SHELL = {
    "{moeport} config schema >&-": (0, ""),
    "{moeport} config schema <&- >&- 2>&-": (0, ""),
    "{moeport} config schema >/dev/full": (2, "error: standard output: cannot be written: the disk is full; free "),
}


@pytest.mark.parametrize("line", mostly_slow(SHELL, list(SHELL)[1:]))
def test_streams_that_are_closed_or_full(line):
    command = line.format(moeport=f"{sys.executable} -m moeport")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    code, error = SHELL[line]
    assert (done.returncode, done.stderr.startswith(error), "Traceback" in done.stderr) == (code, True, False)
