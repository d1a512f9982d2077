"""What is known of the environment of PyTorch and MindSpore on Ascend, as tables.

Read in August 2026 in the documentation of CANN 8.0 to 9.1 and of torch-npu, in torch-npu's own messages and in its
table of versions; none of it was tried on Ascend hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's index of builds without CUDA, from which torch-npu's instructions install PyTorch."""

CANN_FOLDERS = (
    "/usr/local/Ascend/cann",
    "/usr/local/Ascend/ascend-toolkit/latest",
    "~/Ascend/cann",
    "~/Ascend/ascend-toolkit/latest",
)
"""Where CANN is installed unless another folder is asked for: from 8.5 in the first, before in the second; without
root's rights, below the home folder."""
CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""Variables that `set_env.sh` of CANN sets to its folder."""
CANN_VERSION_FILES = (
    "ascend_*_install.info",
    "*-linux/ascend_*_install.info",
    "compiler/version.info",
    "runtime/version.info",
    "version.cfg",
)
"""Files in that folder that name the version, the most reliable first."""


@dataclass(frozen=True)
class Variable:
    """An environment variable."""

    use: str
    """What it decides."""
    reader: str
    """Who reads it."""
    pattern: str = ".+"
    """Regular expression that a right value matches as a whole."""
    expected: str = "a value"
    """What that expression takes, for messages."""
    default: str = "not set"
    computes: str | None = None
    """What of a rank's computation it decides, for records; None: nothing."""


_SWITCH = {"pattern": "[01]", "expected": "0 or 1"}
_BOOLEAN = {"pattern": "(?i:true|false|1|0)", "expected": "true or false"}

VARIABLES: Mapping[str, Variable] = {
    "ASCEND_HOME_PATH": Variable("folder of CANN; its `set_env.sh` sets it", "CANN"),
    "ASCEND_RT_VISIBLE_DEVICES": Variable(
        "the NPUs that a process sees, by number", "CANN", r"\d+(,\d+)*", "numbers such as 0,1,2", "all"
    ),
    "ASCEND_LAUNCH_BLOCKING": Variable(
        "1 runs operators synchronously, so that an error names the right one; slow",
        "torch-npu, MindSpore",
        default="0",
        **_SWITCH,
    ),
    "ASCEND_GLOBAL_LOG_LEVEL": Variable(
        "what CANN logs: 0 debug, 1 info, 2 warning, 3 error, 4 nothing", "CANN", "[0-4]", "0 to 4", "3"
    ),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": Variable(
        "0 keeps `import torch` from loading torch-npu, so PyTorch sees no NPU", "PyTorch", default="1", **_SWITCH
    ),
    "TASK_QUEUE_ENABLE": Variable(
        "operators are launched from a queue: 0 off, 1 on, 2 with more of the work in it, for more memory",
        "torch-npu",
        "[012]",
        "0, 1 or 2",
        "1",
    ),
    "PYTORCH_NPU_ALLOC_CONF": Variable(
        "the allocator of NPU memory; `expandable_segments:True` against fragmentation", "torch-npu"
    ),
    "PYTORCH_ALLOC_CONF": Variable(
        "PyTorch's name for the same setting; torch-npu refuses to start with both", "PyTorch, torch-npu"
    ),
    "MULTI_STREAM_MEMORY_REUSE": Variable(
        "reuse of memory across streams: 0 off, 1 to 3 select how", "torch-npu", "[0-3]", "0, 1, 2 or 3", "1"
    ),
    "CPU_AFFINITY_CONF": Variable(
        "cores of a process: 0 any, 1 its share of the node, 2 also one for each busy thread",
        "torch-npu",
        r"[012](,.+)?",
        "0, 1 or 2, then such as npu0:0-19 or npu_affine:1",
        "0",
    ),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": Variable(
        "1 raises an error where an operator would silently run on the CPU", "torch-npu", default="0", **_SWITCH
    ),
    "HCCL_CONNECT_TIMEOUT": Variable(
        "seconds that ranks wait for each other to connect",
        "HCCL",
        r"1[2-9]\d|[2-9]\d\d|[1-6]\d{3}|7[01]\d\d|7200",
        "120 to 7200",
        "120",
    ),
    "HCCL_EXEC_TIMEOUT": Variable(
        "seconds that a collective may wait for other ranks", "HCCL, torch-npu", r"\d{1,10}", "seconds", "1836"
    ),
    "HCCL_EVENT_TIMEOUT": Variable(
        "seconds that torch-npu waits for an event; more than HCCL_EXEC_TIMEOUT",
        "torch-npu",
        r"\d{1,10}",
        "seconds",
        "1868",
    ),
    "HCCL_BUFFSIZE": Variable(
        "megabytes of a communicator's buffer; each group of ranks takes twice that of NPU memory",
        "HCCL",
        r"[1-9]\d*",
        "megabytes, 1 or more",
        "200",
    ),
    "HCCL_IF_IP": Variable(
        "address of this host at which HCCL's ranks meet; takes precedence over HCCL_SOCKET_IFNAME", "HCCL"
    ),
    "HCCL_SOCKET_IFNAME": Variable(
        "network interface at which HCCL's ranks meet: `=eth0` is eth0 alone, `eth` all that begin with it", "HCCL"
    ),
    "HCCL_ALGO": Variable("algorithms of HCCL", "HCCL", computes="algorithm of HCCL"),
    "HCCL_DETERMINISTIC": Variable(
        "collectives add in a fixed order",
        "HCCL, MindSpore",
        "(?i:true|false|strict)",
        "true, false or strict",
        "false",
        "determinism of HCCL",
    ),
    "LCCL_DETERMINISTIC": Variable(
        "the same for LCCL, the collectives within a node in CANN's ATB library",
        "LCCL",
        default="0",
        computes="determinism of LCCL",
        **_SWITCH,
    ),
    "CLOSE_MATMUL_K_SHIFT": Variable(
        "1 adds up the terms of a matrix product in the same order on all cores",
        "CANN",
        default="0",
        computes="order of the sums in CANN's matrix products",
        **_SWITCH,
    ),
    "ATB_MATMUL_SHUFFLE_K_ENABLE": Variable(
        "0 does the same in the ATB library",
        "ATB",
        default="1",
        computes="order of the sums in ATB's products",
        **_SWITCH,
    ),
    "ATB_LLM_LCOC_ENABLE": Variable(
        "0 keeps ATB from overlapping products with collectives",
        "ATB",
        default="1",
        computes="whether ATB overlaps products with collectives",
        **_SWITCH,
    ),
}
"""Variables that matter on Ascend, by name."""

DETERMINISM: Mapping[str, str] = {
    "HCCL_DETERMINISTIC": "true",
    "LCCL_DETERMINISTIC": "1",
    "CLOSE_MATMUL_K_SHIFT": "1",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "ATB_LLM_LCOC_ENABLE": "0",
}
"""What `backend.deterministic: true` sets, where the user has not, before the NPU starts. The first is documented by
CANN; the others are those that published settings for repeatable runs on Ascend have in common."""

COMPUTES: Mapping[str, str] = {name: each.computes for name, each in VARIABLES.items() if each.computes}
"""Variables that change what a rank computes, and what they change."""


@dataclass(frozen=True)
class Pair:
    """The versions of CANN with which a release of a framework is known to work."""

    package: str
    release: str
    """Its first two numbers."""
    cann: tuple[str, ...]
    """The first two numbers of CANN's version."""
    source: str
    """Who says so."""


PAIRS = (
    Pair("torch-npu", "2.11", ("8.5", "9.0", "9.1"), "release notes and table of versions of torch-npu 26.1"),
    Pair("torch-npu", "2.12", ("8.5", "9.0", "9.1"), "release notes and table of versions of torch-npu 26.1"),
    Pair("torch-npu", "2.14", ("9.2",), "an image of openEuler; in no table of versions yet"),
    Pair("mindspore", "2.10", ("8.2", "8.3", "8.5", "9.0", "9.1"), "the check in MindSpore 2.10 itself"),
)
"""Known pairs. torch-npu 2.13 was in no table when these were read."""


def known_cann(package: str, version: str) -> Pair | None:
    """The row of a release; None if nothing is known of it."""
    release = ".".join(version.split(".")[:2])
    return next((pair for pair in PAIRS if (pair.package, pair.release) == (package, release)), None)


def install_torch(version: str, machine: str) -> str:
    """The command that installs the build of PyTorch that goes with torch-npu, as in torch-npu's own instructions.

    Args:
        version: PyTorch's, such as 2.13.0.
        machine: as in `platform.machine()`; on x86_64 the build without CUDA must be named.
    """
    local = "+cpu" if machine == "x86_64" else ""
    return f"pip install torch=={version}{local} --index-url {CPU_INDEX}"
