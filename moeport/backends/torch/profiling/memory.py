"""The memory of one step, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from moeport.backends.profiler import HeldMemory
from moeport.backends.torch.model import TorchTrainingModel
from moeport.backends.torch.private import viewed
from moeport.backends.torch.profiling.marks import open_parts
from moeport.backends.torch.sharding import local
from moeport.core.parts import PARTS


class SavedTensors:
    """Counts what autograd holds between the forward and the backward pass of the first micro-batch.

    A storage is counted once, for the part that kept it first, whatever views of it are kept. Parameters are left out,
    and what backward passes keep while they recompute.

    Args:
        parameters: of the model, and their copies.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.by_kind: Counter[str] = Counter()
        self._seen = {_storage(local(parameter)) for parameter in parameters}
        self._complete = False

    def counting(self) -> saved_tensors_hooks:
        """The block in which it counts."""
        return saved_tensors_hooks(self._keep, self._give_back)

    def _keep(self, x: Tensor) -> Tensor:
        if not self._complete and not isinstance(viewed(x), nn.Parameter):
            storage = _storage(x)
            if storage not in self._seen:
                self._seen.add(storage)
                self.by_kind[_kind(open_parts())] += x.untyped_storage().nbytes()
        return x

    def _give_back(self, x: Tensor) -> Tensor:
        self._complete = True
        return x


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _kind(parts: tuple[str, ...]) -> str:
    """The kind of the innermost part, or of one around it that counts as a whole."""
    known = [PARTS[name] for name in parts if name in PARTS]
    if not known:
        return "other"
    part = next((part for part in known if part.whole), known[-1])
    return part.waits if part.waits not in ("", "host") else part.kind


@contextmanager
def measured(model: TorchTrainingModel, keep: Callable[[HeldMemory], None]) -> Iterator[None]:
    """Measure the one whole step that the block does, and pass the result to `keep`."""
    parameters = list(model.module.parameters())
    copies = list(model.copies.copies.values())
    saved, gradients = SavedTensors([*parameters, *copies]), 0
    apply = model.step

    def step(*args: Any, **options: Any) -> None:
        nonlocal gradients
        gradients = sum(local(p.grad).nbytes for p in parameters if p.grad is not None)
        apply(*args, **options)

    peak = _DevicePeak() if model.ops.device.type == "cuda" else _HostPeak()
    model.step = step  # type: ignore[method-assign]
    try:
        with peak, saved.counting():
            yield
    finally:
        del model.step
    keep(
        HeldMemory(
            parameters=sum(local(p).nbytes for p in parameters),
            copies=sum(copy.nbytes for copy in copies),
            gradients=gradients,
            optimizer=_state_bytes(model.optimizer),
            activations=dict(saved.by_kind),
            peak=peak.bytes,
        )
    )


def _state_bytes(holder: Any) -> int:
    """Bytes of the tensors in the states of the optimisers that an object holds."""
    optimizers = [each for each in vars(holder).values() if isinstance(each, torch.optim.Optimizer)]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(x.nbytes for state in states for x in state.values() if isinstance(x, Tensor))


class _HostPeak:
    """Peak of what PyTorch allocates on the CPU in the block, as its profiler reports it; a context manager."""

    def __init__(self) -> None:
        self.bytes = 0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> None:
        self._profile.start()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._profile.stop()
        if kind is None:
            held = 0
            for change in _allocations(self._profile):
                held += change
                self.bytes = max(self.bytes, held)


def _allocations(profile: torch.profiler.profile) -> Iterator[int]:
    """Bytes that were allocated, or freed where negative, in the order of time."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        yield event.nbytes()


class _DevicePeak:
    """Peak of what the caching allocator hands out in the block, less what it had before; a context manager.

    Not run on hardware.
    """

    bytes = 0

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.bytes = torch.cuda.max_memory_allocated() - self._before
