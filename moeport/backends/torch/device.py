"""Resolves device and compute type."""

from __future__ import annotations

import time

import torch

from moeport.errors import BackendUnavailableError

MIN_SPEEDUP = 1.3
"""`auto` chooses bfloat16 if a matrix product is at least this many times as fast as in float32."""


def resolve_device(name: str) -> torch.device:
    """The device for `backend.device`: auto is the accelerator if there is one, otherwise the CPU."""
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        return present or torch.device("cpu")
    if present is None or present.type != name:
        found = f"its accelerator is {present.type}" if present else "it sees no accelerator"
        raise BackendUnavailableError(
            f"backend.device: {name} is not usable: this is PyTorch {torch.__version__} and {found}; "
            f"set backend.device to auto, or install a PyTorch build and driver for {name}"
        )
    return present


def describe_device(device: torch.device) -> str:
    """The device's type and its product name, if it has one."""
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{device.type} ({torch.get_device_module(device).get_device_name(device)})"


def accelerators() -> list[tuple[str, int | None]]:
    """Product name, and memory in bytes if known, of every accelerator."""
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is None:
        return []
    module = torch.get_device_module(present)
    found = []
    for index in range(torch.accelerator.device_count()):
        properties = module.get_device_properties(index)
        found.append((properties.name, getattr(properties, "total_memory", None)))
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the best of several square matrix products."""
    size = size or (1024 if device.type == "cpu" else 8192)
    x = torch.ones(size, size, dtype=dtype, device=device)
    x @ x
    best = float("inf")
    for _ in range(24):
        synchronize(device)
        start = time.perf_counter()
        x @ x
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def resolve_dtype(name: str, device: torch.device) -> str:
    """The compute type for `backend.dtype`; auto measures."""
    if name != "auto":
        return name
    speed = {dtype: matmul_flops_per_second(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    return "bfloat16" if speed[torch.bfloat16] >= MIN_SPEEDUP * speed[torch.float32] else "float32"
