"""What a run prints: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as LiveProgress
from rich.table import Column

from moeport.training.duration import duration
from moeport.training.metrics_table import EvaluationMetrics, StepMetrics, printed

RECENT_STEPS = 100
"""Number of recent steps whose mean duration gives the time left."""


class Progress:
    """Prints steps and evaluations; a context manager.

    Args:
        total_steps: optimiser steps of the whole run.
        start_step: steps already done.
        log_interval: steps between plain lines; the first and the last step are always printed.
        console: where to print; on a terminal, a live line.
    """

    def __init__(self, total_steps: int, start_step: int, log_interval: int, console: Console):
        self.total_steps = total_steps
        self.start_step = start_step
        self.log_interval = log_interval
        self.console = console
        self._times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._live: LiveProgress | None = None
        if console.is_terminal and not console.quiet:
            self._live = LiveProgress(
                BarColumn(bar_width=None, table_column=Column(width=16)),
                TextColumn("{task.completed}/{task.total}  {task.description}", markup=False),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("", total=total_steps, completed=start_step)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def step(self, metrics: StepMetrics) -> None:
        """Show an optimiser step."""
        self._times.append(metrics.step_time)
        seconds = sum(self._times) / len(self._times) * (self.total_steps - metrics.step)
        if self._live:
            values = {"left": duration(seconds)} | printed(metrics)
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            self._live.update(self._task, completed=metrics.step, description=text)
        elif metrics.step % self.log_interval == 0 or metrics.step in (self.start_step + 1, self.total_steps):
            self._line(self._position(metrics.step) | printed(metrics) | {"left": duration(seconds)})

    def skipped(self, step: int) -> None:
        """Say that a step is passed over."""
        if self._live:
            self._live.update(self._task, completed=step)
        self._line(self._position(step) | {"skipped": "as training.skip_steps says"})

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Show an evaluation."""
        self._line(self._position(metrics.step) | printed(metrics))

    def say(self, message: str) -> None:
        """Print a message, above the live line if there is one."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _position(self, step: int) -> dict[str, str]:
        return {"step": f"{step}/{self.total_steps}"}

    def _line(self, values: dict[str, str]) -> None:
        self.say("  ".join(f"{name}: {value}" for name, value in values.items()))
