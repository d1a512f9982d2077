"""CUDA graphs, as PyTorch records them. Not run on hardware."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from moeport.model.loss_terms import LossTerms


class CudaRecorder:
    """Implements `moeport.backends.torch.graphs.Recorder` on the current device."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm(self, run: Callable[[], LossTerms]) -> LossTerms:
        """On a stream of its own, as PyTorch's documentation asks before a recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = run()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, run: Callable[[], LossTerms]) -> tuple[Callable[[], None], LossTerms]:
        """The graph has memory of its own. Other threads may go on, such as one that prepares batches.

        PyTorch leaves its stream the current one if the recording fails, so the one before is set again.
        """
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            result = run()
        return graph.replay, result

    @contextmanager
    def watch(self) -> Iterator[list[str]]:
        """By the warnings of PyTorch's debug mode for synchronisation, at the lines at which they come."""
        before = torch.cuda.get_sync_debug_mode()
        waits: list[str] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                yield waits
            waits += [f"{w.filename}:{w.lineno}" for w in said if "synchronizing CUDA operation" in str(w.message)]
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def seconds(self, run: Callable[[], object]) -> tuple[float, float]:
        """Between two waits for the device, of which no debug mode must warn."""
        before = torch.cuda.get_sync_debug_mode()
        self._wait(before)
        started = time.perf_counter()
        run()
        launched = time.perf_counter()
        self._wait(before)
        return launched - started, time.perf_counter() - started

    def _wait(self, mode: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
