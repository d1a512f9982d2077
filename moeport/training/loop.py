"""The steps of a run, with its evaluations, checkpoints and interruptions."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console

from moeport.errors import InterruptedRunError, NonFiniteError
from moeport.training.ahead import drawn_ahead
from moeport.training.checkpoint_meta import checkpoint_name
from moeport.training.evaluate import Evaluation
from moeport.training.lock import RunLock
from moeport.training.metrics import MetricsLog
from moeport.training.metrics_table import EvaluationMetrics, StepMetrics
from moeport.training.metrics_thinning import Thinning
from moeport.training.pace import Pace
from moeport.training.prepare import PreparedRun
from moeport.training.profile import Window
from moeport.training.progress import Progress
from moeport.training.routing_log import RoutingLog, cut_routing
from moeport.training.saving import Saver
from moeport.training.signals import StopRequest
from moeport.training.trackers.tracking import Trackers

REPEATS_SECONDS = 2.0
"""A launcher that is asked to end passes that on to its ranks, which may have been asked as well."""


def run_steps(run: PreparedRun, lock: RunLock | None, console: Console, trackers: Trackers) -> tuple[Evaluation, float]:
    """Run all remaining steps.

    Args:
        run: ready for its next step.
        lock: that of the run folder, on the first rank.
        console: where progress goes.
        trackers: those of the run; none but on the first rank.

    Returns: the evaluation after the last step, and the seconds for which training waited for checkpoints.

    Raises:
        NonFiniteError: a loss, a gradient, a parameter or a moment is not finite; the last good checkpoint remains.
        InterruptedRunError: a signal arrived; the last complete step was saved.
    """
    config = run.config
    with (
        Window(run, console) as window,
        _log(run, trackers) as log,
        Progress(config.training.steps, run.start_step, config.metrics.log_interval, console) as progress,
        StopRequest(REPEATS_SECONDS if run.mesh.world.size > 1 else 0.0) as stop,
        drawn_ahead(run),
        Saver(run, lock, progress.say) as saver,
    ):
        routing = _routing_log(run)
        for note in (*(log.notes if log else ()), *(routing.notes if routing else ())):
            progress.say(note)
        return _Loop(run, log, routing, progress, stop, saver, window).run_all(), saver.seconds


def _log(run: PreparedRun, trackers: Trackers) -> MetricsLog | nullcontext[None]:
    if not run.is_first:
        return nullcontext()
    thinning = Thinning(run.config.metrics.full_loads_interval, run.config.training.steps)
    return MetricsLog(run.dir, run.start_step if run.checkpoint else None, thinning, trackers)


def _routing_log(run: PreparedRun) -> RoutingLog | None:
    """Where the routers' choices are written, if they are counted; every rank has one."""
    counts = run.trainer.counts
    if counts is None:
        if run.is_first:
            cut_routing(run.dir, run.start_step)
        return None
    return RoutingLog(run.dir, run.mesh.world, counts, run.config.training.steps, run.start_step)


class _Loop:
    """What happens after each step, and when."""

    def __init__(
        self,
        run: PreparedRun,
        log: MetricsLog | None,
        routing: RoutingLog | None,
        progress: Progress,
        stop: StopRequest,
        saver: Saver,
        window: Window,
    ):
        self.run, self.log, self.progress, self.stop, self.saver = run, log, progress, stop, saver
        self.routing, self.window = routing, window
        self._waited = 0.0
        """Seconds of the saver's that the metrics have."""
        self.last = run.config.training.steps
        self.pace = Pace(run.mesh.world, run.config.metrics.log_interval)

    def run_all(self) -> Evaluation:
        """Run the remaining steps, if any; returns the evaluation after the last step."""
        evaluation = None
        for step in range(self.run.start_step + 1, self.last + 1):
            try:
                evaluation = self._run(step)
            except NonFiniteError as error:
                self.saver.finish()
                raise NonFiniteError(f"{error}. {self._way_on(error.step or step)}") from error
        return evaluation or self._evaluate(self.last)

    def _run(self, step: int) -> Evaluation | None:
        """One step, and what is due after it; returns its evaluation, if it has one."""
        config = self.run.config
        self._train(step)
        evaluates = self._is_due(step, config.training.evaluation_interval)
        saves = self._is_due(step, config.checkpoint.interval)
        counts = self.routing is not None and self.routing.is_due(step)
        looks = evaluates or saves or counts or self.pace.is_due(bool(self.stop))
        if looks or self.run.trainer.waits:
            self._record()
        if looks:
            self.pace.looked()
        if self.routing and counts:
            self.routing.write(step)
        evaluation = self._evaluate(step) if evaluates else None
        self.saver.check()
        if saves or self.saver.keeps(evaluation):
            self._save(evaluation, waits=step == self.last)
        if looks and self._any_rank_stops() and step < self.last:
            self._interrupt(evaluation)
        return evaluation

    def _is_due(self, step: int, interval: int) -> bool:
        """Whether `step` is the last one or, unless `interval` is 0, a multiple of `interval`."""
        return step == self.last or (interval > 0 and step % interval == 0)

    def _train(self, step: int) -> None:
        self.pace.stepped()
        if self.run.config.training.skips(step):
            self._record()
            self.run.trainer.skip()
            if self.log:
                self.log.skipped(step)
            self.progress.skipped(step)
        elif self.window.slowed(step):
            self._record()
            with self.window.around(step):
                metrics = self.run.trainer.step()
            self._write(metrics)
        else:
            self.run.trainer.advance()

    def _way_on(self, step: int) -> str:
        """How to continue after the run diverged at `step`."""
        saved = self.saver.saved_step
        start = f"continue from {checkpoint_name(saved)}, the last good checkpoint," if saved else "start from step 1"
        return (
            f"Lower optimizer.learning_rate or lengthen optimizer.schedule.warmup_steps and {start} with --resume; "
            f"if only this batch is at fault, skip it with --set 'training.skip_steps=[\"{step}\"]'"
        )

    def _record(self) -> None:
        """Wait for the steps that were begun, and write their metrics; every rank calls it."""
        for metrics in self.run.trainer.collect():
            self._write(metrics)

    def _write(self, metrics: StepMetrics) -> None:
        self.window.note(metrics)
        metrics = replace(metrics, save_time=self.saver.seconds - self._waited)
        self._waited = self.saver.seconds
        if self.window.slowed(metrics.step):
            metrics = replace(metrics, profiled=1)
        if self.log:
            self.log.step(metrics)
        self.progress.step(metrics)
        for line in self.run.backend.news():
            self.progress.say(f"step: {metrics.step}/{self.last}  {line}")

    def _save(self, evaluation: Evaluation | None, waits: bool) -> None:
        if self.log:
            self.log.sync()
        if self.routing:
            self.routing.write(self.run.trainer.step_number)
        with self.window.paused():
            self.saver.save(evaluation, waits)

    def _evaluate(self, step: int) -> Evaluation:
        run, training = self.run, self.run.config.training
        size = training.evaluation_batch_size or training.batch_size // run.trainer.batches.num_parts
        with self.window.paused():
            result = run.task.evaluate(run.mesh.world, run.trainer.model, size)
            by_frequency = (
                run.task.loss_by_frequency(run.mesh.world, run.trainer.model, size)
                if step == self.last and run.config.metrics.loss_by_frequency
                else None
            )
            by_objective = run.task.loss_by_objective(run.mesh.world, run.trainer.model, size)
        parts = result.loss_by_domain, by_frequency, by_objective
        metrics = EvaluationMetrics(step, result.loss, result.bits_per_byte, result.accuracy, *parts)
        if self.log:
            self.log.evaluation(metrics)
        self.progress.evaluation(metrics)
        if not math.isfinite(result.loss):
            named = self.saver.non_finite()
            raise NonFiniteError(
                f"step {step}: the validation loss after it is {result.loss}"
                f"{f', since parameter {named} is not finite' if named else ''}, and nothing of this step was saved"
            )
        return result

    def _any_rank_stops(self) -> bool:
        """Whether any rank has received a signal, so that all ranks stop after the same step."""
        return self.pace.agree(bool(self.stop))

    def _interrupt(self, evaluation: Evaluation | None) -> None:
        step = self.run.trainer.step_number
        if self.saver.saved_step != step:
            self._save(evaluation, waits=True)
        self.saver.finish()
        self.run.mesh.world.barrier()  # a launcher kills the other ranks once one has ended
        raise InterruptedRunError(
            f"stopped after step {step} of {self.last}; everything is saved in {self.run.dir}. "
            "Continue with the same command and --resume"
        )
