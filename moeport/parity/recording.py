"""One side of a comparison: tensors by name in the order of execution, and how they were computed."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from moeport.ascend.table import COMPUTES
from moeport.core.ops import FLOAT_DTYPES
from moeport.core.parameters import INITIAL_VALUES_VERSION, generator
from moeport.errors import UserError
from moeport.parity.options import SAMPLE_SIZE
from moeport.version import VERSION

Kind = Literal[
    "parameter",
    "input",
    "activation",
    "score",
    "decision",
    "plan",
    "loss",
    "gradient",
    "training gradient",
    "moment",
    "update",
    "state",
    "second step",
]
"""Kind of a tensor. Decisions turn floats into integers or booleans; plans are other integers; scores are floats of a
router; gradients are those of the first loss, training gradients those that the optimiser received, moments what it
keeps of them after a step, and updates the changes that it made. A state is what is not trained but changes in
training, such as the bias of a router, after a step or a pass. The second step is what the optimiser receives, keeps
and changes there."""
Keep = Literal["full", "sample", "statistics"]
"""How much of a tensor is kept: all entries, some entries and statistics, or only statistics."""

STATISTICS_ENTRIES = 2**13
"""Statistics of a larger tensor cover at least this many entries, and less than twice as many."""
RUN = 2**10
"""Consecutive entries that are read together: runs are fast to read, single entries are not."""
EVERYTHING: dict[str, Keep] = {}
"""Keeps every tensor whole."""
SAMPLED: dict[str, Keep] = dict.fromkeys(
    ("parameter", "activation", "gradient", "training gradient", "moment", "update", "state", "second step"), "sample"
)
"""What bundles keep by default: samples of large tensors, and everything that decides routing."""
STATISTICS: dict[str, Keep] = dict.fromkeys([*SAMPLED, "score"], "statistics")
"""Keeps statistics of every float tensor; decisions and losses stay whole."""


def kept_kinds(pairs: Iterable[str]) -> dict[str, Keep]:
    """`SAMPLED` with changes of the form `KIND=HOW`; ALL stands for every kind. Raises UserError for other texts."""
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


NO_GRADIENTS, NO_TRAINING, INSIDE_UNSEEN = "not differentiated: ", "not trained: ", "inside of blocks"
"""Beginnings of notes on what a backend could not do, and of those on blocks that were left alone."""
MICRO_BATCHES = "micro-batches"
"""Key of the environment: number of micro-batches over all ranks."""

STORED: dict[str, int] = {
    "float8_e8m0fnu": 0,
    "float8_e5m2": 2,
    "float8_e5m2fnuz": 2,
    "float8_e4m3fn": 3,
    "float8_e4m3fnuz": 3,
    "qint8": 6,
    "quint8": 6,
}
"""Types in which models from elsewhere store numbers but do not compute, the coarsest first, with the stored bits of
their significands (OCP 8-bit floating point; for integers with a scale, those of an entry of usual size)."""
FLOATS = (*FLOAT_DTYPES, "float16", *STORED)
"""Types whose entries are numbers with rounding; those after FLOAT_DTYPES are for models from elsewhere."""
ENVIRONMENT_VARIABLES = (
    *COMPUTES,
    "ASCEND_LAUNCH_BLOCKING",
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TASK_QUEUE_ENABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables that affect results."""


@dataclass(frozen=True)
class Statistics:
    """Two numbers on those entries of a tensor that `runs` selects."""

    mean: float
    rms: float
    """Root of the mean square."""


def runs(x: Any) -> Any:
    """The entries that statistics of a flat array cover: every k-th run of RUN entries, k = n // STATISTICS_ENTRIES.

    Args:
        x: (n,), a numpy array or one of a backend.

    Returns: all of `x` if n <= STATISTICS_ENTRIES, else (m,).
    """
    size = x.shape[0]
    if size <= STATISTICS_ENTRIES:
        return x
    return x[: size // RUN * RUN].reshape((-1, RUN))[:: size // STATISTICS_ENTRIES].reshape((-1,))


@dataclass(frozen=True)
class TensorRecord:
    """A recorded tensor."""

    name: str
    """A name such as `layers.0/attention.q:linear`."""
    kind: Kind
    dtype: str
    """Name of the tensor's type on the device."""
    shape: tuple[int, ...]
    layer: int | None = None
    """Index of the block, if it belongs to one."""
    op: str | None = None
    """Operation that computed it; None if it precedes all operations."""
    inputs: tuple[str, ...] = ()
    """Recorded tensors and `parameter:NAME` that the operation read."""
    keep: Keep = "full"
    values: np.ndarray | None = None
    """Entries, with `shape` if kept whole, (n,) if sampled; None if only statistics were kept."""
    statistics: Statistics | None = None
    """Statistics of all entries; None for whole tensors, which do not need them."""

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
    """Step number, counted from 1."""
    loss: float
    """Cross entropy in nats per token."""
    total_loss: float
    grad_norm: float
    load_balance: float
    router_z: float
    lr: float
    expert_load: list[list[float]]
    """Each expert's share of the assignments, one row per MoE layer."""


@dataclass
class Recording:
    """One side of a comparison: a variant of a config on one machine, or a model from elsewhere."""

    name: str
    """A name such as `torch-cpu:bf16`."""
    dtype: str
    """Compute type, which determines the tolerance."""
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    """Tensors by name, in the order of execution: parameters, inputs, forward pass, losses, gradients, updates."""
    trajectory: list[Step] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, device, kernels and the environment variables that affect results."""
    replayed: str | None = None
    """Name of the recording whose routing it followed; None: its own."""
    sample_size: int = SAMPLE_SIZE
    """Entries of a sampled tensor."""
    notes: list[str] = field(default_factory=list)
    """What was not recorded, and why."""
    non_finite: str | None = None
    """The first tensor with a NaN or an infinity that is no mask, with its pass and operation; None if there is none.
    """


def sample_indices(size: int, count: int) -> np.ndarray:
    """Sorted indices (n,) of the sampled entries of a tensor with `size` entries, n <= count.

    They depend on nothing else, so they are the same on every machine and for tensors with other names.
    """
    return np.unique(generator(0, "parity sample").integers(0, size, count))


def environment(backend: str, device: str, versions: Mapping[str, str], kernels: Mapping[str, str]) -> dict[str, Any]:
    """What a recording tells about the machine it was made on."""
    return {
        "moeport": VERSION,
        "initial_values": INITIAL_VALUES_VERSION,
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
