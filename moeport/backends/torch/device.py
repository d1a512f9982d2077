"""Resolves device and compute type."""

from __future__ import annotations

import os
import time

import torch

from moeport.ascend.checks import findings
from moeport.ascend.installed import machine
from moeport.ascend.trouble import AUTOLOAD
from moeport.errors import BackendUnavailableError

SMALLEST = 256
"""Width of the first matrices by which speed is measured: quick on any device, also on one that is emulated."""
LARGEST = {"cpu": 1024, "accelerator": 8192}
"""Width beyond which they do not grow."""
PRODUCTS = 32
"""Maximum number of products that are timed."""
TRIAL_SECONDS = 0.5
"""About the longest time that a measurement takes."""


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
            f"set backend.device to auto, or {_install(name)}"
        )
    return present


def _install(device: str) -> str:
    """How a device that PyTorch does not see becomes usable."""
    if device != "npu":
        return f"install a PyTorch build and driver for {device}"
    wrong = [finding for finding in findings(machine()) if finding.severity == "wrong"]
    if wrong:
        return f"fix what keeps torch-npu from it: {wrong[0]}"
    return "install torch-npu, CANN and the driver, as docs/ascend.md describes" + (
        f"; unset {AUTOLOAD}" if os.environ.get(AUTOLOAD) == "0" else ""
    )


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


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float = TRIAL_SECONDS) -> float:
    """FLOP/s of the best of several square matrix products, which grow as far as the time allows.

    Args:
        device: where to compute.
        dtype: type of the matrices.
        seconds: rough limit of the time it takes, beyond the first product of the smallest size.
    """
    size, largest, best = SMALLEST, LARGEST["cpu" if device.type == "cpu" else "accelerator"], 0.0
    x = torch.ones(size, size, dtype=dtype, device=device)
    _product_seconds(x)  # the first one prepares the library, which may take seconds on an accelerator
    end = time.perf_counter() + seconds
    for _ in range(PRODUCTS):
        took = _product_seconds(x)
        best = max(best, 2 * size**3 / took)
        left = end - time.perf_counter()
        if size < largest and 3 * 8 * took < left:
            size *= 2
            x = torch.ones(size, size, dtype=dtype, device=device)
            _product_seconds(x)
        elif took > left:
            break
    return best


def _product_seconds(x: torch.Tensor) -> float:
    """Time of one product."""
    synchronize(x.device)
    start = time.perf_counter()
    x @ x
    synchronize(x.device)
    return time.perf_counter() - start
