"""What a resumed run continues from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeport.config.schema import Config
from moeport.errors import CheckpointError
from moeport.training.checkpoint import Checkpoint, list_checkpoints, open_checkpoint, verify_checkpoint
from moeport.training.fits import check_finite, finite
from moeport.training.resumable import announced, check_resumable
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.side_files import faults, read_summary
from moeport.training.summary import RunSummary


def newest(config: Config) -> Checkpoint | None:
    """The newest checkpoint of the run folder; None if there is none.

    Raises CheckpointError, also when its arrays are read, if it is damaged or of a diverged run; the message says how
    to continue from the newest good one. None is passed over by itself: what is lost so would be noticed too late.
    """
    paths = list_checkpoints(config.run.dir / CHECKPOINT_DIR)
    if not paths:
        return None
    with telling_way_back(config):
        return finite(open_checkpoint(paths[-1]))


@contextmanager
def telling_way_back(config: Config) -> Iterator[None]:
    """Adds to a CheckpointError of the newest checkpoint how to continue without it."""
    try:
        yield
    except CheckpointError as error:
        paths = list_checkpoints(config.run.dir / CHECKPOINT_DIR)
        raise CheckpointError(f"{error}. {_way_back(paths)}") from error


def finished(
    config: Config, checkpoint: Checkpoint, say: Callable[[str], None], verifies: bool = True
) -> RunSummary | None:
    """The summary of a run that has done all its steps; None if there is something left to do or to repair.

    Args:
        config: the whole config.
        checkpoint: the newest one.
        say: prints a line.
        verifies: whether to read the checkpoint, which nothing else reads if there is nothing to do.

    Raises:
        UserError: the config is not one that the run could be resumed with.
        CheckpointError: the checkpoint is damaged.
    """
    steps = config.training.steps
    if checkpoint.meta.step < steps:
        return None
    if verifies:
        with telling_way_back(config):
            _good(checkpoint.path)
    changes = check_resumable(config, checkpoint)
    wrong = list(faults(config, checkpoint))
    for fault in wrong:
        say(f"{fault}; it is written again")
    if wrong:
        return None
    say(f"{config.run.dir} is finished: all {steps} steps are done")
    for line in announced(changes, checkpoint.meta.step, steps):
        say(line)
    return read_summary(config.run.dir)


def _good(path: Path) -> None:
    """Read a checkpoint from end to end. Raises CheckpointError if it cannot be continued from."""
    check_finite(verify_checkpoint(path))


def _way_back(paths: list[Path]) -> str:
    """How to continue without the newest checkpoint."""
    for tried, path in enumerate(reversed(paths[:-1]), 1):
        try:
            _good(path)
        except CheckpointError:
            continue
        others = ", ".join(str(other) for other in paths[-tried:])
        return f"To continue from {path.name}, the newest good one, delete {others} or move it to another folder"
    return f"No checkpoint in {paths[-1].parent} is good; start another run with --set run.dir=FOLDER"
