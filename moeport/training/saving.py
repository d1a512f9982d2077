"""Which steps of a run become checkpoints, and what a checkpoint holds."""

from __future__ import annotations

import math

from moeport.errors import NonFiniteError
from moeport.training.checkpoint import best_checkpoint, prune_checkpoints, read_meta, save_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.evaluate import Evaluation
from moeport.training.fits import non_finite
from moeport.training.lock import RunLock
from moeport.training.prepare import PreparedRun
from moeport.version import VERSION


class Saver:
    """Writes the checkpoints of a run on the first rank, and remembers the best and the last one on every rank."""

    def __init__(self, run: PreparedRun, lock: RunLock | None):
        self.run, self.lock = run, lock
        self.saved_step = run.start_step
        """Step of the last checkpoint; 0 for the initial weights, which are not saved."""
        best = best_checkpoint(run.checkpoints) if run.checkpoint else None
        self._best_loss = read_meta(best).val_loss if best else None

    def keeps(self, evaluation: Evaluation | None) -> bool:
        """Whether a step is kept because of its evaluation."""
        return self.run.config.checkpoint.keep_best and self._is_best(evaluation)

    def save(self, evaluation: Evaluation | None) -> None:
        """Write a checkpoint of the current step and delete those that are no longer kept; every rank calls it.

        Args:
            evaluation: that of this step, if there was one.

        Raises NonFiniteError, on every rank and before anything is written, if a parameter or a moment is not finite.
        """
        run, trainer = self.run, self.run.trainer
        parameters, state = trainer.model.parameters(), trainer.model.optimizer_state()
        if name := non_finite(parameters) or non_finite(state):
            raise NonFiniteError(
                f"step {trainer.step_number}: {name} is not finite, and nothing of this step was saved"
            )
        self.saved_step = trainer.step_number
        if evaluation and self._is_best(evaluation):
            self._best_loss = evaluation.loss
        if not run.is_first:
            return
        if self.lock:
            self.lock.check()
        save_checkpoint(run.checkpoints, self._meta(evaluation), parameters, state)
        prune_checkpoints(run.checkpoints, run.config.checkpoint.keep_last, run.config.checkpoint.keep_best)

    def _is_best(self, evaluation: Evaluation | None) -> bool:
        if evaluation is None or not math.isfinite(evaluation.loss):
            return False
        return self._best_loss is None or evaluation.loss < self._best_loss

    def _meta(self, evaluation: Evaluation | None) -> CheckpointMeta:
        run, step = self.run, self.run.trainer.step_number
        return CheckpointMeta(
            step=step,
            tokens=run.trainer.updates * run.trainer.tokens_per_step,
            val_loss=evaluation.loss if evaluation else None,
            tokenizer=run.task.tokenizer_fingerprint,
            data=run.task.train.fingerprint,
            config=run.config.model_dump(mode="json"),
            version=VERSION,
        )
