"""The cores of this machine, and what they compute in."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from moeport.ascend.installed import npus
from moeport.launch.launcher import Launch
from moeport.processes import cores_of

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
"""Flags of processors that multiply in bfloat16: those of x86, then those of Arm."""


@dataclass(frozen=True)
class Processor:
    """The kind of processor."""

    model: str
    bfloat16: bool | None
    """Whether it multiplies in bfloat16; None: not known."""


def processor(cpuinfo: Path = CPUINFO) -> Processor:
    """This machine's processor, from what Linux says of it; elsewhere, its name only."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    arm = " ".join(fields[name] for name in ("CPU implementer", "CPU part", "CPU variant") if name in fields)
    flags = fields.get("flags") or fields.get("Features")
    return Processor(
        fields.get("model name") or arm or platform.processor() or platform.machine(),
        bool(BFLOAT16_FLAGS & {*flags.split()}) if flags else None,
    )


def cores_per_rank(launch: Launch | None) -> int:
    """Number of cores that this rank has for itself if the ranks of its node share those of the node evenly."""
    return share_of_cores(launch.local_size if launch and launch.local_size else 1)


def share_of_cores(ranks: int) -> int:
    """The same for a number of ranks on this node.

    A launcher that gives each rank its own cores leaves its parent, the launcher, more than it gives to a rank.
    """
    own = cores_of(0)
    return len(own) if ranks == 1 else max(1, min(len(own), len(own | cores_of(os.getppid())) // ranks))


def memory_bytes() -> int | None:
    """Physical memory, or the limit of the container if that is lower; None: not known."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return memory


def accelerators_seen(driver: Path = Path("/proc/driver/nvidia/gpus"), devices: Path = Path("/dev")) -> list[str]:
    """NVIDIA GPUs and Ascend NPUs that the system lists, whether or not a framework can use them."""
    found = []
    for file in sorted(driver.glob("*/information")):
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        found.append(lines.get("Model", "NVIDIA GPU").strip())
    return found + [f"Ascend NPU {name}" for name in npus(devices)]


def load() -> float | None:
    """Processes that wanted to run, mean of the last minute; None: not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
