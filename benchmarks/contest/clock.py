"""Time, memory and waits of the host on any device of torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SPIN_CYCLES = 6_000_000
"""Work that keeps an NVIDIA GPU busy for a few milliseconds, so that the host can run ahead as in training."""
WAITING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
"""Operators whose results' values or shapes the host must know."""
WAITING_METHODS = ("tolist", "numpy", "cpu", "__array__")


def runtime(device: str) -> Any:
    """The module of a device, such as torch.cuda."""
    return torch.get_device_module(torch.device(device).type)


def device_name(device: str) -> str:
    """The product name of an accelerator; empty for a CPU."""
    return "" if torch.device(device).type == "cpu" else str(runtime(device).get_device_name())


def synchronize(device: str) -> None:
    """Wait until the device has done its work."""
    if torch.device(device).type != "cpu":
        runtime(device).synchronize()


def milliseconds(fn: Callable[[], object], device: str) -> float:
    """Time of a call: by events on an accelerator, otherwise by the clock."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        fn()
        return (time.perf_counter() - start) * 1e3
    module = runtime(device)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    module.synchronize()
    if hasattr(module, "_sleep"):
        module._sleep(SPIN_CYCLES)
    begin.record()
    fn()
    end.record()
    module.synchronize()
    return float(begin.elapsed_time(end))


def free_bytes(device: str) -> float:
    """Memory of the device that nobody uses; infinite where it is not counted."""
    if torch.device(device).type == "cpu" or not hasattr(runtime(device), "mem_get_info"):
        return float("inf")
    return float(runtime(device).mem_get_info()[0])


@contextmanager
def saved_bytes(without: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves for a backward pass inside the block, by address.

    Args:
        without: tensors whose storages do not count, such as weights.
    """
    left_out = {x.untyped_storage().data_ptr() for x in without}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield found


def held_bytes(run: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> int:
    """Bytes that a layer holds between forward and backward, the tokens included and the weights not.

    On an accelerator it is the growth of the allocated memory plus the tokens, if that is more: it also counts what a
    layer keeps otherwise than through autograd.
    """
    module = runtime(x.device.type) if x.device.type != "cpu" else None
    before = module.memory_allocated() if module else 0
    with saved_bytes(weights) as saved:
        y = run(x)
    total = sum(saved.values())
    if module:
        size = x.numel() * x.element_size()
        output = 0 if y.untyped_storage().data_ptr() in saved else y.untyped_storage().nbytes()
        total = max(total, module.memory_allocated() - before - output + size)
    return total


def peak_bytes(both: Callable[[], object], device: str) -> int | None:
    """Growth of the allocated memory at most, during a forward and backward pass; None where it is not counted."""
    if torch.device(device).type == "cpu":
        return None
    module = runtime(device)
    module.synchronize()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    both()
    module.synchronize()
    return int(module.max_memory_allocated() - before)


def host_waits(fn: Callable[[], object], device: str) -> int | None:
    """How often the host waits for the device in a call.

    On an accelerator its runtime warns about each; on the CPU those operations are counted that would wait on an
    accelerator. None where neither is possible.
    """
    if torch.device(device).type == "cpu":
        with _WaitingMethods() as methods, _WaitingOperators() as operators:
            fn()
        return methods.count + operators.count
    module = runtime(device)
    if not hasattr(module, "set_sync_debug_mode"):
        return None
    module.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fn()
    finally:
        module.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


class _WaitingOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in WAITING_OPERATORS
        return func(*args, **(kwargs or {}))


class _WaitingMethods(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in WAITING_METHODS
        return func(*args, **(kwargs or {}))
