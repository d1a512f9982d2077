"""Summarises a finished run, and estimates one that is not started."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
from array import array
from dataclasses import asdict

from moeport.data import DomainTokens
from moeport.files import write_json
from moeport.training.agreed import ENVIRONMENT
from moeport.training.checkpoint import find_checkpoint
from moeport.training.evaluate import Evaluation
from moeport.training.metrics import iterate_metrics
from moeport.training.metrics_table import StepMetrics
from moeport.training.prepare import PreparedRun
from moeport.training.report import write_report
from moeport.training.run_dir import METRICS_FILE, SUMMARY_FILE
from moeport.training.starts import read_starts
from moeport.training.summary import DryRun, RunSummary
from moeport.version import VERSION


def summarise(run: PreparedRun, evaluation: Evaluation, seconds: float, save_time: float) -> RunSummary | None:
    """Draw a sample, and write summary and report; every rank calls it.

    Args:
        run: all of its steps are done.
        evaluation: that after the last step.
        seconds: time that this process spent on steps, evaluations and checkpoints.
        save_time: part of it for which training waited for checkpoints.

    Returns: the summary on the first rank; None on the others.
    """
    of_the_task = run.task.summary(run.trainer.model)
    if not run.is_first:
        return None
    steps = _Steps(run)
    counts = run.trainer.shapes.parameter_counts()
    compilations, compile_seconds = run.backend.compilations()
    starts = read_starts(run.dir)
    summary = RunSummary(
        run_dir=str(run.dir),
        steps=run.config.training.steps,
        val_loss=evaluation.loss,
        val_bits_per_byte=evaluation.bits_per_byte,
        val_accuracy=evaluation.accuracy,
        val_loss_by_domain=evaluation.loss_by_domain,
        domains=_domains(run),
        tokens_per_second=statistics.median(steps.speeds) if steps.speeds else None,
        wall_time=seconds + steps.seconds_before,
        save_time=save_time,
        peak_memory=_peak_memory(),
        parameters_total=counts.total,
        parameters_active=counts.active,
        training_flops_per_token=run.trainer.flops_per_token,
        device=run.backend.device,
        dtype=run.backend.dtype,
        versions={"python": platform.python_version(), "moeport": VERSION, **run.backend.versions()},
        commit=starts[-1].commit if starts else "",
        kernels=run.backend.kernel_choices(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        checkpoint=str(find_checkpoint(run.checkpoints, "latest")),
        **of_the_task,
        compilations=compilations,
        compile_seconds=compile_seconds,
        capacity_per_layer=steps.last.capacity_per_layer if steps.last else [],
        drop_rate=steps.last.drop_rate if steps.last else 0.0,
    )
    write_json(run.dir / SUMMARY_FILE, asdict(summary))
    if run.config.metrics.report and steps.last:
        write_report(run.dir)
    return summary


def _domains(run: PreparedRun) -> dict[str, dict[str, float]]:
    """Tokens and epochs that the run takes from each domain."""
    train, training, dealing = run.task.train, run.config.training, run.trainer.batches.dealing
    if dealing is None or not isinstance(train, DomainTokens):
        return {}
    updates = training.updates(training.steps)
    return {
        name: {
            "tokens": updates * count * train.sequence_length,
            "epochs": updates * count / train.parts[name].num_sequences,
        }
        for name, count in dealing.counts.items()
    }


class _Steps:
    """What a summary needs of the steps of a run, some or all of whose records may be lost."""

    def __init__(self, run: PreparedRun):
        self.last: StepMetrics | None = None
        self.seconds_before = 0.0
        """Duration of the steps that were done before this process started."""
        speeds = array("d")
        profiled = array("d")
        for record in iterate_metrics(run.dir / METRICS_FILE):
            if isinstance(record, StepMetrics):
                (profiled if record.profiled else speeds).append(record.tokens_per_second)
                self.seconds_before += record.step_time if record.step <= run.start_step else 0.0
                self.last = record
        self.speeds = speeds or profiled
        """Tokens per second of the steps, without the profiled ones unless all are."""


def measure(run: PreparedRun) -> DryRun | None:
    """Run two steps that leave no trace, and estimate the whole run from them; every rank calls it.

    Returns: the estimate on the first rank, timed on the second step; None on the others.
    """
    trainer, training = run.trainer, run.config.training
    trainer.step()
    seconds = trainer.step().step_time
    if not run.is_first:
        return None
    counts = trainer.shapes.parameter_counts()
    return DryRun(
        parameters_total=counts.total,
        parameters_active=counts.active,
        training_flops_per_token=trainer.flops_per_token,
        tokens_per_step=trainer.tokens_per_step,
        steps=training.steps,
        epochs=training.steps * training.batch_size / run.task.train.num_sequences,
        seconds_per_step=seconds,
        device=run.backend.device,
        dtype=run.backend.dtype,
        memory=f"{run.memory}; two steps took at most {_peak_memory():.2f} GiB of the host",
    )


def _peak_memory() -> float:
    """Peak resident set in GiB; Linux reports KiB, macOS bytes."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
