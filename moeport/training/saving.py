"""Which steps of a run become checkpoints, what a checkpoint holds, and how ranks write it together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

from moeport.core.moments import moment_names
from moeport.errors import MoeportError, NonFiniteError, WriteError
from moeport.files import (
    LOOK_SECONDS,
    discard,
    find_temporary,
    put_folder,
    start_folder,
    token_of,
    write_error,
    writing,
)
from moeport.training.beside import Beside
from moeport.training.checkpoint import best_checkpoint, prune_checkpoints, read_meta
from moeport.training.checkpoint_meta import CheckpointMeta, checkpoint_name
from moeport.training.checkpoint_writing import complete, give_up, write_rank
from moeport.training.evaluate import Evaluation
from moeport.training.host_copy import HostCopy, Live, Parts, non_finite_part, shards_of
from moeport.training.host_memory import available_memory, gib
from moeport.training.lock import RunLock
from moeport.training.prepare import PreparedRun
from moeport.version import VERSION

SHARE = 0.8
"""Of a host's free memory, what the copies of its ranks may take."""
FOLDER_SECONDS = 60.0
"""Longest time until a rank sees what another has written to the folder that they share."""
CAUSE_SECONDS = 10.0
"""For which a rank whose folder the first rank has deleted lets the first rank end the job with the cause."""


class Saver:
    """Writes the checkpoints of a run, each rank its part, and remembers the best and the last one on every rank.

    A context manager: when it is left, nothing is being written any more.

    Args:
        run: every rank has its own.
        lock: that of the run folder, on the first rank.
        say: prints a line.
    """

    def __init__(self, run: PreparedRun, lock: RunLock | None, say: Callable[[str], None] = lambda line: None):
        self.run, self.lock, self._say = run, lock, say
        self.saved_step = run.start_step
        """Step of the last checkpoint; 0 for the initial weights, which are not saved."""
        self.seconds = 0.0
        """Time for which training has waited here."""
        best = best_checkpoint(run.checkpoints) if run.checkpoint else None
        self._best_loss = read_meta(best).val_loss if best else None
        self._live = Live(run.trainer.model, run.mesh.world.rank)
        self._copy: HostCopy | None = None
        self._asynchronous = run.config.checkpoint.asynchronous
        self._begun: Beside | None = None
        self._folder: Path | None = None
        """Where this rank writes, while it does."""
        specs = run.trainer.shapes.parameter_specs()
        self._names = [*(spec.name for spec in specs), *moment_names(specs, run.config.optimizer.name)]

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; its failure is raised, or printed if there is another error already."""
        try:
            if error is None or isinstance(error, Exception):
                self.finish()
                self._see_committed(error)
        except MoeportError as failed:
            if error is None:
                raise
            if failed is not error:
                self._say(str(failed))
        finally:
            if self._folder and self.run.is_first:
                discard(self._folder)

    def keeps(self, evaluation: Evaluation | None) -> bool:
        """Whether a step is kept because of its evaluation."""
        return self.run.config.checkpoint.keep_best and self._is_best(evaluation)

    def save(self, evaluation: Evaluation | None, waits: bool = False) -> None:
        """Write a checkpoint of the current step and delete those that are no longer kept; every rank calls it.

        Args:
            evaluation: that of this step, if there was one.
            waits: whether to have written it on return, as before the end of the run.

        Raises:
            NonFiniteError: on every rank and before anything is written, if a parameter or a moment is not finite.
            WriteError: this checkpoint or the one before cannot be written.
        """
        begun = time.perf_counter()
        self.finish()
        copy = None if waits else self._host_copy()
        parts, broken = (copy or self._live).take()
        token = self._started(broken)
        work = self._work(token, self._meta(evaluation), parts)
        self.saved_step = self.run.trainer.step_number
        if evaluation and self._is_best(evaluation):
            self._best_loss = evaluation.loss
        if copy:
            self._begun = Beside(work)
        else:
            work()
        self.seconds += time.perf_counter() - begun

    def check(self) -> None:
        """Raises the error of a checkpoint that could not be written in the background, on the rank where it failed."""
        if self._begun and self._begun.is_over:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written in the background. Raises its error, once."""
        begun, self._begun = self._begun, None
        if begun:
            begun.wait()

    def non_finite(self) -> str | None:
        """Name of the first parameter that is not finite on some rank; every rank calls it."""
        world = self.run.mesh.world
        _, name = self._agreed(0, non_finite_part(shards_of(self.run.trainer.model, "model", world.rank)))
        return name

    def _host_copy(self) -> HostCopy | None:
        """Memory for copies, by which checkpoints are written in the background; None if they are not."""
        if self._copy is None and self._asynchronous == "auto":
            self._asynchronous = self._fits()
        if self._copy is None and self._asynchronous:
            self._copy = HostCopy(self.run.trainer.model, self.run.mesh.world.rank)
        return self._copy

    def _fits(self) -> bool:
        """Whether the copies of all ranks fit the memory of their hosts; every rank calls it."""
        world = self.run.mesh.world
        self._live.take()
        needed, free = self._live.num_bytes * world.nodes.count(world.nodes[world.rank]), available_memory()
        fits = not world.sum_of_numbers(np.array([float(needed > SHARE * free)]))[0]
        how = "in the background, from" if fits else "while training waits:"
        why = "" if fits else f" would not fit the free memory of every host; here {gib(free)} are free"
        self._say(f"checkpoints are written {how} a copy of {gib(self._live.num_bytes)} per rank{why}")
        return fits

    def _started(self, broken: str | None) -> int:
        """The number by which every rank finds the folder that the first rank has made; every rank calls it.

        Args:
            broken: the array of this rank that is not finite, if any.

        Raises NonFiniteError, on every rank, if some array is not finite.
        """
        run, token = self.run, 0
        if run.is_first:
            self._folder = start_folder(self._final)
            token = token_of(self._folder)
        token, name = self._agreed(token, broken)
        if name:
            raise NonFiniteError(
                f"step {run.trainer.step_number}: {name} is not finite, and nothing of this step was saved"
            )
        return token

    def _agreed(self, token: int, broken: str | None) -> tuple[int, str | None]:
        """The first rank's number, and the array that is not finite on the first rank that has one."""
        world = self.run.mesh.world
        values = np.zeros(1 + world.size)
        values[0] = token
        values[1 + world.rank] = 1 + self._names.index(broken) if broken else 0
        values = world.sum_of_numbers(values)
        named = values[1:][values[1:] > 0]
        return int(values[0]), self._names[int(named[0]) - 1] if named.size else None

    @property
    def _final(self) -> Path:
        return self.run.checkpoints / checkpoint_name(self.run.trainer.step_number)

    def _work(self, token: int, meta: CheckpointMeta, parts: Parts) -> Callable[[], None]:
        """What this rank does to write a checkpoint; it needs no other rank's answer but their files."""
        run, final, world = self.run, self._final, self.run.mesh.world
        keep = run.config.checkpoint.keep_last, run.config.checkpoint.keep_best

        def work() -> None:
            with writing(final):
                folder = self._folder if run.is_first else find_temporary(run.checkpoints, token, FOLDER_SECONDS)
                if folder is None:
                    raise WriteError(
                        f"{run.checkpoints}: rank {world.rank} does not see the folder of the checkpoint of step "
                        f"{meta.step} that rank 0 has made; put run.dir on storage that all nodes share"
                    )
                self._folder = folder
                self._write_part(folder, final, parts)
                if run.is_first:
                    self._commit(folder, final, meta)
                    prune_checkpoints(run.checkpoints, *keep)

        return work

    def _write_part(self, folder: Path, final: Path, parts: Parts) -> None:
        """Write the files of this rank; if that fails, tell the first rank."""
        world = self.run.mesh.world
        try:
            write_rank(folder, world.rank, world.size, *parts)
        except Exception as error:
            if not (self.run.is_first or folder.exists()):
                time.sleep(CAUSE_SECONDS)
                raise WriteError(f"{final}: rank 0 has given this checkpoint up; see its output") from error
            give_up(folder, world.rank, world.size, str(write_error(final, error) or repr(error)))
            raise

    def _commit(self, folder: Path, final: Path, meta: CheckpointMeta) -> None:
        """On the first rank, make a checkpoint of what all ranks write, or delete it."""
        try:
            complete(folder, meta, self.run.mesh.world.size, self.run.config.comm.timeout)
            if self.lock:
                self.lock.check()
            put_folder(folder, final)
        except Exception:
            discard(folder)
            raise

    def _see_committed(self, error: Exception | None) -> None:
        """Where a rank fails, let the first rank make a checkpoint, or delete what it cannot, before they all end."""
        end = time.monotonic() + FOLDER_SECONDS
        folder = None if self.run.is_first else self._folder
        while error and folder and folder.exists() and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)

    def _is_best(self, evaluation: Evaluation | None) -> bool:
        if evaluation is None or not math.isfinite(evaluation.loss):
            return False
        return self._best_loss is None or evaluation.loss < self._best_loss

    def _meta(self, evaluation: Evaluation | None) -> CheckpointMeta:
        run, step = self.run, self.run.trainer.step_number
        dealing = run.trainer.batches.dealing
        return CheckpointMeta(
            step=step,
            tokens=run.trainer.updates * run.trainer.tokens_per_step,
            val_loss=evaluation.loss if evaluation else None,
            tokenizer=run.task.tokenizer_fingerprint,
            data=run.task.train.fingerprint,
            config=run.config.model_dump(mode="json"),
            version=VERSION,
            domains=dealing.counts if dealing else None,
            origin=run.origin,
        )
