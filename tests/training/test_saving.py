"""Checkpoints that are written in the background."""

import errno
import threading

import pytest
from rich.console import Console

from moeport.errors import InterruptedRunError, NonFiniteError, UserError, WriteError
from moeport.training import loop, saving
from moeport.training.checkpoint import list_checkpoints, verify_checkpoint
from moeport.training.fits import check_finite
from moeport.training.lock import LOCK_FILE
from moeport.training.metrics import read_metrics
from moeport.training.run import train
from moeport.training.side_files import read_summary
from moeport.training.trainer import Trainer
from tests.training.tiny import tiny_config

SECONDS = 60


def config_of(folder, asynchronous, **sections):
    checkpoint = {"interval": 2, "keep_last": 9, "keep_best": False, "asynchronous": asynchronous}
    return tiny_config(folder, **{"checkpoint": checkpoint, **sections})


def said_by(config, **options):
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    try:
        train(config, console=console, **options)
    finally:
        console.file.close()
    return console.export_text()


def contents(config):
    paths = list_checkpoints(config.run.dir / "checkpoints")
    return {
        file.relative_to(path.parent): file.read_bytes() for path in paths for file in path.glob("[mo]*.safetensors")
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("whole"), False)
    train(config, console=Console(quiet=True))
    return config, contents(config)


def test_what_is_written_beside_training_is_the_same(tmp_path, uninterrupted):
    config = config_of(tmp_path, "auto")
    said = said_by(config)
    assert said.count("checkpoints are written in the background, from a copy of ") == 1
    assert contents(config) == uninterrupted[1]
    steps, _ = read_metrics(config.run.dir / "metrics.jsonl")
    assert [step.step for step in steps if step.save_time] == [3, 5], "the step after each but the last"
    assert read_summary(config.run.dir).save_time >= sum(step.save_time for step in steps)
    assert not list(config.run.dir.rglob("*.tmp"))


def test_without_memory_for_a_copy_training_waits(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(saving, "available_memory", lambda: 1000.0)
    monkeypatch.setattr(saving, "Beside", None)
    config = config_of(tmp_path, "auto")
    said = said_by(config)
    assert said.count("checkpoints are written while training waits: a copy of ") == 1
    assert " would not fit the free memory of every host; here 0.0 MiB are free" in said
    assert contents(config) == uninterrupted[1]


class Writes:
    """Takes the place of `write_rank`, and does something before."""

    def __init__(self, monkeypatch, before):
        self.write, self.before, self.calls, self.running = saving.write_rank, before, 0, 0
        monkeypatch.setattr(saving, "write_rank", self)

    def __call__(self, folder, *arguments):
        self.calls += 1
        self.running += 1
        assert self.running == 1, "at most one is being written"
        self.before(self.calls)
        self.write(folder, *arguments)
        self.running -= 1


def test_training_goes_on_while_one_checkpoint_is_written(tmp_path, uninterrupted, monkeypatch):
    """The first write ends only after two further steps were taken; the second save waits for it."""
    went_on, seen = threading.Event(), []

    def advance(self, *arguments):
        original(self, *arguments)
        if self.step_number == 4:
            went_on.set()

    def before(number):
        if number == 1:
            seen.append(went_on.wait(SECONDS))

    original = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", advance)
    writes = Writes(monkeypatch, before)
    config = config_of(tmp_path, True)
    train(config, console=Console(quiet=True))
    assert (seen, writes.calls) == ([True], 3)
    assert contents(config) == uninterrupted[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_write_that_fails_stops_the_run_and_loses_nothing(tmp_path, uninterrupted, monkeypatch, number, at):
    def before(count):
        if count == at:
            raise OSError(number, "")

    def advance(self, *arguments):
        if self.step_number == 2 * at:
            writing = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
            assert len(writing) <= 1
            for thread in writing:
                thread.join(SECONDS)  # its error is kept as it ends
        original(self, *arguments)

    original = Trainer.advance
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance)
        Writes(patch, before)
        config = config_of(tmp_path, True)
        with pytest.raises(WriteError) as error:
            train(config, console=Console(quiet=True))
    cause = "the disk is full" if number == errno.ENOSPC else "permission denied"
    assert f"checkpoints/step-{2 * at:06d}: cannot be written: {cause}" in str(error.value)
    steps, _ = read_metrics(config.run.dir / "metrics.jsonl")
    assert len(steps) <= 2 * at + 1, "it is reported at the next step"
    assert len(list_checkpoints(config.run.dir / "checkpoints")) == at - 1
    assert not list(config.run.dir.rglob("*.tmp"))
    train(config, resume=True, console=Console(quiet=True))
    assert contents(config) == uninterrupted[1]


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_waits_for_what_is_being_written(tmp_path, monkeypatch, fails):
    """A run that diverges while a checkpoint is written names that checkpoint as the one to go on from."""
    diverged = threading.Event()

    def before(count):
        assert diverged.wait(SECONDS)
        if fails:
            raise OSError(errno.ENOSPC, "")

    def train_step(self, step):
        if step == 3:
            diverged.set()
            raise NonFiniteError("step 3: loss is nan")
        original(self, step)

    original = loop._Loop._train
    monkeypatch.setattr(loop._Loop, "_train", train_step)
    Writes(monkeypatch, before)
    config = config_of(tmp_path, True)
    with pytest.raises(WriteError if fails else NonFiniteError) as error:
        train(config, console=Console(quiet=True))
    paths = list_checkpoints(config.run.dir / "checkpoints")
    if fails:
        assert "the disk is full" in str(error.value)
        assert "loss is nan" in str(error.value.__context__)
        assert not paths
        return
    assert "continue from step-000002, the last good checkpoint" in str(error.value)
    check_finite(verify_checkpoint(paths[-1]))


def test_an_interruption_waits_for_what_is_being_written(tmp_path, monkeypatch):
    stopped = threading.Event()

    def stops(self):
        if self.saver.saved_step == 2:
            stopped.set()
            return True
        return False

    Writes(monkeypatch, lambda count: stopped.wait(SECONDS))
    monkeypatch.setattr(loop._Loop, "_any_rank_stops", stops)
    config = config_of(tmp_path, True)
    with pytest.raises(InterruptedRunError, match="stopped after step 2 of 6; everything is saved"):
        train(config, console=Console(quiet=True))
    assert [path.name for path in list_checkpoints(config.run.dir / "checkpoints")] == ["step-000002"]


def test_a_lock_that_was_lost_makes_no_checkpoint(tmp_path, monkeypatch):
    config = config_of(tmp_path, True)
    Writes(monkeypatch, lambda count: (config.run.dir / LOCK_FILE).unlink(missing_ok=True) if count == 2 else None)
    with pytest.raises(UserError, match=r"the lock .* is gone, so this run stops before it writes there again"):
        train(config, console=Console(quiet=True))
    assert [path.name for path in list_checkpoints(config.run.dir / "checkpoints")] == ["step-000002"]
    assert not list(config.run.dir.rglob("*.tmp"))
