"""Resolves device and compute type."""

from __future__ import annotations

import functools
import os

import mindspore as ms
from mindspore.device_context import ascend

from moeport.ascend.table import DETERMINISM
from moeport.backends.mindspore import private
from moeport.errors import BackendUnavailableError

DEVICES = {"cpu": "CPU", "npu": "Ascend"}
"""MindSpore's device target by our name."""


def resolve_device(name: str) -> str:
    """The device for `backend.device`, cpu or npu; auto is an Ascend NPU if there is one, otherwise the CPU."""
    if name == "auto":
        return "npu" if ascend.is_available() else "cpu"
    if name not in DEVICES:
        raise BackendUnavailableError(f"backend.device: mindspore runs on cpu or npu (got {name})")
    if name == "npu" and not ascend.is_available():
        raise BackendUnavailableError(
            f"backend.device: npu is not usable: MindSpore {ms.__version__} finds no Ascend runtime; set "
            "backend.device to auto or cpu, or install the driver and CANN and source its set_env.sh before starting"
        )
    return name


def resolve_dtype(name: str, device: str) -> str:
    """The compute type for `backend.dtype`; auto is bfloat16 on an NPU and float32 on the CPU."""
    if name == "auto":
        return "bfloat16" if device == "npu" else "float32"
    if name == "bfloat16" and device == "cpu":
        raise BackendUnavailableError(
            "backend.dtype: MindSpore's CPU target does not compute in bfloat16; expected float32 or float64"
        )
    return name


def use_device(device: str, deterministic: bool) -> None:
    """Make `device` the one that MindSpore uses in this process."""
    if device == "npu" and deterministic:
        for name, value in DETERMINISM.items():
            os.environ.setdefault(name, value)
    ms.set_device(DEVICES[device])
    if device == "npu":
        ms.set_deterministic(deterministic)
        ascend.op_precision.matmul_allow_hf32(False)  # float32 products in float32, as on other devices
    else:
        _stop_spinning()


def is_on_cpu() -> bool:
    """Whether this process uses the CPU, whose memory is the host's."""
    return ms.get_context("device_target") == "CPU"


@functools.cache
def _stop_spinning() -> None:
    """Run graphs in the calling thread; MindSpore accepts this setting once per process.

    By default MindSpore runs them in threads that wait for each other in busy loops. On a machine with few cores these
    compete with the computation: with two cores, a matrix product takes twice as long.
    """
    private.run_in_calling_thread()
    ms.runtime.dispatch_threads_num(1)


def accelerators() -> list[tuple[str, int | None]]:
    """Product name, and memory in bytes if known, of every NPU. MindSpore only reports the memory of the one in use."""
    if not ascend.is_available():
        return []
    memory = ms.hal.get_device_properties(0).total_memory or None  # 0 until the device is initialised
    return [(ms.hal.get_device_name(index), memory) for index in range(ascend.device_count())]


def describe_device(device: str) -> str:
    """The device's type and its product name, if it has one."""
    return f"npu ({ms.hal.get_device_name(0)})" if device == "npu" else "cpu"
