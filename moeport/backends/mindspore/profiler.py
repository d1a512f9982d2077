"""A profile with mindspore.profiler."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore.profiler import ProfilerActivity, tensorboard_trace_handler
from typing_extensions import override

from moeport.backends.profiler import HeldMemory, Profiler, WorkTimes
from moeport.files import atomic_folder


class MindSporeProfiler(Profiler):
    """Tables of operations, and on Ascend a trace; it does not tell where operations were called, nor their memory.

    Args:
        device: `cpu` or `npu`.
    """

    def __init__(self, device: str):
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.NPU] if device == "npu" else [])]
        self._running: Any = None
        self._folder = ""

    @property
    @override
    def held(self) -> HeldMemory | None:
        return None

    @override
    def memory(self) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    def step(self) -> AbstractContextManager[None]:
        if self._running is None:
            self._folder = tempfile.mkdtemp()
            handler = tensorboard_trace_handler(self._folder)
            self._running = ms.profiler.profile(activities=self._activities, on_trace_ready=handler)
            self._running.__enter__()
        return nullcontext()

    @override
    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    def finish(self, trace: Path) -> WorkTimes | None:
        profile, self._running = self._running, None
        if profile is not None:
            try:
                profile.__exit__(None, None, None)
                with atomic_folder(trace) as folder:
                    shutil.copytree(self._folder, folder / "mindspore", dirs_exist_ok=True)
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)
        return None
