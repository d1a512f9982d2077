"""The steps of a run that are profiled, and what is written of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console

from moeport.backends.profiler import HeldMemory, WorkTimes
from moeport.config.schema import Config
from moeport.core.parts import KINDS
from moeport.errors import InterruptedRunError, NonFiniteError
from moeport.files import check_folder, make_folder, write_json
from moeport.model.memory import ModelSizes, memory
from moeport.training.metrics_table import StepMetrics
from moeport.training.prepare import PreparedRun
from moeport.training.profile_table import tables
from moeport.training.run_dir import PROFILE_DIR, PROFILE_FILE

SKIPPED = 5
"""Steps after the start of a process that are not profiled unless the config says where to begin: they allocate,
compile and measure."""
RECENT = 20
"""Steps before the window whose median duration it is compared with."""
HELD = ("parameters", "copies", "gradients", "optimizer", "peak", "temporary")


def steps_to_profile(config: Config, start_step: int) -> range:
    """The steps that are timed, counted from 1; empty if there are none.

    Args:
        config: the whole config.
        start_step: the number of steps that were done before this process started.
    """
    metrics, last = config.metrics, config.training.steps
    if metrics.profile_step is not None:
        first, number = metrics.profile_step, 1
    elif not metrics.profile:
        return range(0)
    else:
        number = metrics.profile_steps
        skipped = max(0, min(SKIPPED, last - start_step - number))
        first = metrics.profile_start or start_step + 1 + skipped
    return range(max(first, start_step + 1), min(first + number - 1, last) + 1)


class Window:
    """Profiles some steps of a run on every rank; a context manager around all of them.

    Args:
        run: ready for its next step.
        console: where the tables are printed at the end.

    Raises BackendUnavailableError if the backend has no profiler.
    """

    def __init__(self, run: PreparedRun, console: Console):
        self.run, self.console = run, console
        self.steps = steps_to_profile(run.config, run.start_step)
        self._profiler = run.backend.profiler(run.trainer.model) if self.steps else None
        self._timed: list[int] = []
        """Steps that were begun under the profiler."""
        self._usual: list[float] = []
        self._is_open = bool(self.steps)
        self._result: dict[str, Any] | None = None
        if self.steps and run.is_first:
            check_folder(run.dir / PROFILE_DIR)

    def __enter__(self) -> Window:
        metrics, last = self.run.config.metrics, self.run.config.training.steps
        first = metrics.profile_step or (metrics.profile_start if metrics.profile else None)
        if first and first > last and self.run.is_first:
            self.console.print(f"nothing will be profiled: the profile begins at step {first}, the run ends at {last}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(together=error is None or isinstance(error, InterruptedRunError | NonFiniteError))
        except Exception as problem:
            if error is None:
                raise
            self.console.print(f"the profile could not be written: {problem}", markup=False)
        if self._result:
            for table in tables(self._result):
                self.console.print(table.drawn())

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """The block that does a step."""
        if not self._is_open or self._profiler is None or step < self.steps.start - 1:
            yield
        elif step < self.steps.start:
            with self._profiler.memory():
                yield
        else:
            self._timed.append(step)
            with self._profiler.step():
                yield
            if step >= self.steps.stop - 1:
                self._close(together=True)

    def paused(self) -> AbstractContextManager[None]:
        """A block between steps whose time does not count."""
        return self._profiler.paused() if self._is_open and self._profiler else nullcontext()

    def slowed(self, step: int) -> bool:
        """Whether a step was timed, or its memory measured, and so took longer than it would have."""
        return bool(self.steps) and self.steps.start - 1 <= step < self.steps.stop

    def note(self, metrics: StepMetrics) -> None:
        """Take notice of how long a step took."""
        if self._is_open and not self.slowed(metrics.step):
            self._usual = [*self._usual[1 - RECENT :], metrics.step_time]

    def _close(self, together: bool) -> None:
        """End the trace and write it; if all ranks do so `together`, also what they found."""
        if not self._is_open or self._profiler is None:
            return
        self._is_open = False
        if not self._timed:
            return
        run, world = self.run, self.run.mesh.world
        folder = run.dir / PROFILE_DIR
        make_folder(folder)
        name = f"steps-{self._timed[0]}-{self._timed[-1]}-rank-{world.rank}"
        times = self._profiler.finish(folder / name)
        if not together:
            return
        found = _numbers(times, self._profiler.held)
        all_ranks = np.zeros((world.size, len(found)))
        all_ranks[world.rank] = list(found.values())
        summed = world.sum_of_numbers(all_ranks)
        if run.is_first:
            self._result = self._summed_up(times, dict(zip(found, summed.T, strict=True)))
            write_json(folder / PROFILE_FILE, self._result)

    def _summed_up(self, times: WorkTimes | None, by_rank: dict[str, np.ndarray]) -> dict[str, Any]:
        """What profile.json holds: means, minima and maxima over the ranks; times are per step."""
        run, steps = self.run, len(self._timed)

        def spread(name: str, divisor: float = 1.0) -> dict[str, float]:
            values = by_rank[name] / divisor
            return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}

        result: dict[str, Any] = {
            "steps": [self._timed[0], self._timed[-1]],
            "ranks": run.mesh.world.size,
            "device": run.backend.device,
            "usual_step_seconds": statistics.median(self._usual[1:] or self._usual) if self._usual else None,
        }
        if times:
            wall = by_rank["wall"].mean()
            result |= {
                "clock": times.clock,
                "step_seconds": spread("wall", steps),
                "kinds": {
                    kind: spread(f"kind {kind}", steps) | {"share": float(by_rank[f"kind {kind}"].mean() / wall)}
                    for kind in KINDS
                },
                "overlapped_communication": spread("overlapped", steps),
                "others": [[name, seconds / steps] for name, seconds in times.others],
            }
        if "parameters" in by_rank:
            result["memory"] = {
                "tokens": self._tokens,
                **{name: spread(name) for name in HELD if name in by_rank},
                "activations": {kind: spread(f"held {kind}") for kind in KINDS if by_rank[f"held {kind}"].any()},
                "planned": self._planned(),
            }
        return result

    @property
    def _tokens(self) -> int:
        """Tokens of a micro-batch of one rank."""
        batches = self.run.trainer.batches
        return batches.tokens_per_step // batches.num_parts

    def _planned(self) -> dict[str, float]:
        """The estimate of `moeport plan` for one rank, in bytes."""
        config, mesh = self.run.config, self.run.mesh
        sizes = ModelSizes.of(config, getattr(self.run.trainer.shapes, "vocab_size", 0))
        planned = memory(config, sizes, mesh.world.size, mesh.experts.size, self._tokens)
        return {
            "parameters": planned.parameters,
            "gradients": planned.gradients,
            "optimizer": planned.moments,
            "activations": planned.activations,
        }


def _numbers(times: WorkTimes | None, held: HeldMemory | None) -> dict[str, float]:
    """Everything that is compared over the ranks, by name."""
    found: dict[str, float] = {}
    if times:
        found |= {"wall": times.wall, "overlapped": times.overlapped}
        found |= {f"kind {kind}": times.seconds[kind] for kind in KINDS}
    if held:
        found |= {name: getattr(held, name) for name in HELD if getattr(held, name) is not None}
        found |= {f"held {kind}": held.activations.get(kind, 0) for kind in KINDS}
    return found
