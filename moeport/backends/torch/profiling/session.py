"""A profile with torch.profiler."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from typing_extensions import override

from moeport.backends.profiler import HeldMemory, Profiler, WorkTimes
from moeport.backends.torch.model import TorchTrainingModel
from moeport.backends.torch.profiling.marks import PAUSE, STEP, marking
from moeport.backends.torch.profiling.memory import measured
from moeport.backends.torch.profiling.trace import times_of
from moeport.files import atomic_file

DEVICE_ACTIVITIES = {"cuda": ProfilerActivity.CUDA}
"""What the profiler records of a device, by its type; of others it records the launches only."""


class TorchProfiler(Profiler):
    """Traces steps with torch.profiler, and counts what autograd holds with hooks on saved tensors.

    Args:
        model: whose steps are profiled.
    """

    def __init__(self, model: TorchTrainingModel):
        self.model = model
        self._held: HeldMemory | None = None
        self._running: torch.profiler.profile | None = None
        self._marks = ExitStack()

    @property
    @override
    def held(self) -> HeldMemory | None:
        return self._held

    @contextmanager
    def _memory(self) -> Iterator[None]:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with marking(self.model.ops), measured(self.model, self._keep):
            yield

    def _keep(self, held: HeldMemory) -> None:
        self._held = held

    @override
    def memory(self) -> AbstractContextManager[None]:
        return self._memory()

    @override
    def step(self) -> AbstractContextManager[None]:
        if self._running is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print its own progress to standard error
            self._marks.enter_context(marking(self.model.ops))
            device = DEVICE_ACTIVITIES.get(self.model.ops.device.type)
            self._running = torch.profiler.profile(activities=[ProfilerActivity.CPU, *([device] if device else [])])
            self._running.start()
        return record_function(STEP)

    @override
    def paused(self) -> AbstractContextManager[None]:
        return record_function(PAUSE) if self._running else nullcontext()

    @override
    def finish(self, trace: Path) -> WorkTimes | None:
        profile, self._running = self._running, None
        if profile is None:
            return None
        with record_function("wait for the device"):
            if self.model.ops.device.type != "cpu":
                torch.accelerator.synchronize()
        profile.stop()
        self._marks.close()
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(plain))
            with (
                plain.open("rb") as source,
                atomic_file(trace.with_name(trace.name + ".json.gz")) as target,
                gzip.open(target, "wb", compresslevel=6) as compressed,
            ):
                shutil.copyfileobj(source, compressed)
            events = json.loads(plain.read_text(encoding="utf-8", errors="replace"), strict=False)
        return times_of(events)
