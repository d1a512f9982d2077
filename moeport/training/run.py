"""One training run, from a config to a report: what `moeport train` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

from rich.console import Console

from moeport.backends import get_backend, join_job
from moeport.comm.communicator import Communicator
from moeport.comm.job import Job
from moeport.comm.mesh import Mesh
from moeport.config.schema import Config
from moeport.errors import InterruptedRunError, NonFiniteError, UserError
from moeport.files import check_folder, make_folder, remove_leftovers
from moeport.launch.launcher import Launch, launched
from moeport.pages.console import PlainConsole
from moeport.training.agreed import of_backend, of_checkpoint, of_dtype, of_kernels, of_start
from moeport.training.announce import announcement
from moeport.training.checkpoint import Checkpoint, list_checkpoints
from moeport.training.lock import RunLock, refuse_locked
from moeport.training.loop import run_steps
from moeport.training.prepare import PreparedRun, planned, prepare, with_dtype
from moeport.training.ranks import check_ranks, check_trains
from moeport.training.resumable import with_former_defaults
from moeport.training.resume import finished, newest
from moeport.training.run_dir import CHECKPOINT_DIR, config_of, refuse_used, remove_results, write_config
from moeport.training.starts import record_start
from moeport.training.storage import check_shared
from moeport.training.summarise import measure, summarise
from moeport.training.summary import DryRun, RunSummary
from moeport.training.trackers.tracking import Trackers, check_trackers, open_trackers


def train(
    config: Config, *, resume: bool = False, dry_run: bool = False, console: Console | None = None
) -> RunSummary | DryRun | None:
    """Train the model that `config` describes, in `config.run.dir`. In a job, every process calls it.

    Args:
        config: the whole config.
        resume: continue from the last checkpoint in the folder, or start if there is none; a finished run only
            returns its summary.
        dry_run: prepare the data, build the model, measure two steps and write nothing to the run folder.
        console: where progress goes; default standard output. Only the first rank prints.

    Returns: the summary on the first rank; None on the others.

    Raises:
        UserError: for errors that the user can fix.
        NonFiniteError: a loss or gradient is not finite; the last checkpoint is untouched.
        InterruptedRunError: Ctrl-C or SIGTERM; the last complete step was saved.
    """
    launch = launched()
    if launch and launch.rank != 0:
        console = PlainConsole(quiet=True, force_terminal=False)
    console = console or PlainConsole()
    if launch and config.comm.ranks_per_node:
        launch = launch.on_nodes_of(config.comm.ranks_per_node)
    say = partial(_say, console)
    with join_job(launch, config.comm.timeout, config.backend) as job:
        job.agree(*of_start("train", config, {"--resume": resume, "--dry-run": dry_run}))
        check_ranks(config, job.size)
        if not dry_run:
            refuse_locked(config.run.dir)
        checkpoint = newest(config) if resume and not dry_run else None
        if checkpoint:
            config = with_former_defaults(config, checkpoint)
        if checkpoint and config.backend.dtype == "auto":
            config = with_dtype(config, checkpoint.meta.config["backend"]["dtype"])
        is_first = launch is None or launch.rank == 0
        summary = finished(config, checkpoint, say, is_first) if checkpoint else None
        job.agree(of_checkpoint(checkpoint, summary is not None))
        if summary:
            return summary
        if not (resume or dry_run):
            refuse_used(config.run.dir)
        if not dry_run and is_first:
            check_folder(config.run.dir)
            check_trackers(config)
        check_trains(config)
        outcome = _on_all(config, checkpoint, launch, job, dry_run, console)
    if isinstance(outcome, InterruptedRunError | NonFiniteError):
        raise outcome
    return outcome


def _on_all(
    config: Config, checkpoint: Checkpoint | None, launch: Launch | None, job: Job, dry_run: bool, console: Console
) -> RunSummary | DryRun | InterruptedRunError | NonFiniteError | None:
    """Train, or measure; errors that are raised on all ranks alike are returned, so that ranks shut down in order."""
    backend, say = get_backend(config.backend), partial(_say, console)
    if config.backend.dtype == "auto":
        backend.planned = planned(config, job.size)
    job.agree(of_backend(backend))
    with backend.communicator(launch, config.comm.timeout, job) as world:
        world.agree(of_dtype(backend), of_kernels(backend))
        mesh = Mesh(world, config.parallelism.expert)
        try:
            if dry_run:
                return measure(prepare(config, None, backend, mesh, say))
            with _locked(config, world, checkpoint, say) as lock:
                return _train(prepare(config, checkpoint, backend, mesh, say), lock, console)
        except (InterruptedRunError, NonFiniteError) as error:
            return error


@contextmanager
def _locked(
    config: Config, world: Communicator, checkpoint: Checkpoint | None, say: Callable[[str], None]
) -> Iterator[RunLock | None]:
    """Hold the lock of the run folder, on the first rank for all of them.

    Raises UserError if another process holds it, or has trained in the folder since this one looked.
    """
    if world.rank != 0:
        yield None
        return
    with RunLock(config.run.dir, say) as lock:
        latest = list_checkpoints(config.run.dir / CHECKPOINT_DIR)[-1:]
        if latest != ([checkpoint.path] if checkpoint else []):
            raise UserError(
                f"run.dir: another process has trained in {config.run.dir} while this one started; repeat the command"
            )
        yield lock


def _train(run: PreparedRun, lock: RunLock | None, console: Console) -> RunSummary | None:
    """Run all remaining steps; returns the summary on the first rank."""
    if run.is_first:
        make_folder(run.dir)
        remove_leftovers(run.checkpoints)
        write_config(run.dir, run.config if run.is_unfinished else _trained_with(run))
        run.task.save(run.dir)
        record_start(run.dir, run.start_step, run.mesh.world.size, run.task.describe())
        if run.is_unfinished:
            remove_results(run.dir)
    check_shared(run)
    for line in announcement(run):
        _say(console, line)
    started = time.perf_counter()
    with open_trackers(run.dir, run.config, run.start_step) if run.is_first else Trackers() as trackers:
        evaluation, save_time = run_steps(run, lock, console, trackers)
        summary = summarise(run, evaluation, time.perf_counter() - started, save_time)
        if summary:
            trackers.summary(asdict(summary))
    return summary


def _trained_with(run: PreparedRun) -> Config:
    """The config of a run without steps to do: that of its checkpoint, since changes had no effect."""
    return config_of(run.checkpoint).model_copy(update={"run": run.config.run}) if run.checkpoint else run.config


def _say(console: Console, text: str) -> None:
    """Print one plain line."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
