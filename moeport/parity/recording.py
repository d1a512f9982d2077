"""What one side of a comparison is: tensors by name in the order of execution, and how they came about."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from moeport.core.ops import FLOAT_DTYPES
from moeport.core.parameters import generator
from moeport.errors import UserError
from moeport.parity.options import SAMPLE_SIZE
from moeport.version import VERSION

Kind = Literal[
    "parameter", "input", "activation", "score", "decision", "plan", "loss", "gradient", "training gradient", "update"
]
"""Class of a tensor. Decisions turn floats into integers or booleans; plans are other integers; scores are floats of a
router; gradients are those of the first loss, training gradients those that the optimiser saw, updates what it made of
them."""
Keep = Literal["full", "sample", "statistics"]
"""How much of a tensor is kept: all entries, some of them and statistics, or statistics alone."""

STATISTICS_ENTRIES = 2**13
"""Statistics of a tensor that has more entries are of so many at least, and of less than twice as many."""
RUN = 2**10
"""Consecutive entries that are taken together: a run is fast to read, single entries are not."""
EVERYTHING: dict[str, Keep] = {}
"""Keeps every tensor whole."""
SAMPLED: dict[str, Keep] = dict.fromkeys(
    ("parameter", "activation", "gradient", "training gradient", "update"), "sample"
)
"""What bundles keep unless told otherwise: samples of what is large, and all that decides routing."""
STATISTICS: dict[str, Keep] = dict.fromkeys([*SAMPLED, "score"], "statistics")
"""Statistics of every float tensor; decisions and losses stay whole."""


def kept_kinds(pairs: Iterable[str]) -> dict[str, Keep]:
    """`KIND=HOW` laid over `SAMPLED`; a kind of ALL is every kind. Raises UserError for other texts."""
    kinds, hows = get_args(Kind), get_args(Keep)
    kept = dict(SAMPLED)
    for pair in pairs:
        kind, _, how = pair.partition("=")
        if kind not in (*kinds, "ALL") or how not in hows:
            raise UserError(
                f"--keep {pair}: expected KIND=HOW with a kind of {', '.join(kinds)}, ALL and one of {', '.join(hows)}"
            )
        kept |= dict.fromkeys(kinds if kind == "ALL" else (kind,), how)
    return kept


MICRO_BATCHES = "micro-batches"
"""Of the environment: parts of the batch that were computed one by one, over all ranks."""

FLOATS = (*FLOAT_DTYPES, "float16")
"""Types whose entries are floating-point numbers; the last is for foreign models."""
ENVIRONMENT_VARIABLES = (
    "ASCEND_LAUNCH_BLOCKING",
    "ATEN_CPU_CAPABILITY",
    "CLOSE_MATMUL_K_SHIFT",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "HCCL_DETERMINISTIC",
    "LCCL_DETERMINISTIC",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TASK_QUEUE_ENABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables that change results."""


@dataclass(frozen=True)
class Statistics:
    """Two numbers on a tensor's entries: on those that `runs` takes of it."""

    mean: float
    rms: float
    """Root of the mean square."""


def runs(x: Any) -> Any:
    """The entries of a flat array that its statistics are of: every k-th run of RUN, k = n // STATISTICS_ENTRIES.

    Args:
        x: (n,), an array of numpy or of a backend.

    Returns: all of `x` if n <= STATISTICS_ENTRIES, else (m,).
    """
    size = x.shape[0]
    if size <= STATISTICS_ENTRIES:
        return x
    return x[: size // RUN * RUN].reshape((-1, RUN))[:: size // STATISTICS_ENTRIES].reshape((-1,))


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as it was recorded."""

    name: str
    """Such as `layers.0/attention.q:linear`."""
    kind: Kind
    dtype: str
    """Name of its type on the device."""
    shape: tuple[int, ...]
    layer: int | None = None
    """Block, where it belongs to one."""
    op: str | None = None
    """Operation that made it; None for what stands before any operation."""
    inputs: tuple[str, ...] = ()
    """Recorded tensors and `parameter:NAME` that the operation read."""
    keep: Keep = "full"
    values: np.ndarray | None = None
    """Entries: of `shape` if kept whole, (n,) if sampled, None if only statistics were kept."""
    statistics: Statistics | None = None
    """Of all entries; None for whole tensors, whose entries say it."""

    @property
    def is_float(self) -> bool:
        """Whether its entries are floating-point numbers."""
        return self.dtype in FLOATS

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Step:
    """One optimiser step of the trajectory."""

    step: int
    """From 1."""
    loss: float
    """Cross entropy, nats a token."""
    total_loss: float
    grad_norm: float
    load_balance: float
    router_z: float
    lr: float
    expert_load: list[list[float]]
    """Share of the assignments of each expert, a row for each MoE layer."""


@dataclass
class Recording:
    """One side: a variant of a config on one machine, or a foreign model."""

    name: str
    """Such as `torch-cpu:bf16`."""
    dtype: str
    """Compute type; decides the tolerance."""
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    """By name, in the order of execution: parameters, inputs, forward pass, losses, gradients, updates."""
    trajectory: list[Step] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, device, kernels and the variables that change results."""
    replayed: str | None = None
    """Whose routing it ran with; None: its own."""
    sample_size: int = SAMPLE_SIZE
    """Entries of a sampled tensor."""
    notes: list[str] = field(default_factory=list)
    """What was not recorded, and why."""


def sample_indices(size: int, count: int) -> np.ndarray:
    """Places (n,) of the sampled entries of a tensor of `size` entries, sorted, n <= count.

    They depend on nothing else, so they are the same on every machine and for tensors of other names.
    """
    return np.unique(generator(0, "parity sample").integers(0, size, count))


def environment(backend: str, device: str, versions: Mapping[str, str], kernels: Mapping[str, str]) -> dict[str, Any]:
    """What a recording says of the machine it was made on."""
    return {
        "moeport": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "byte_order": sys.byteorder,
        "backend": backend,
        "device": device,
        "versions": dict(versions),
        "kernels": dict(kernels),
        "variables": {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
    }
