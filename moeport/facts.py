"""What each backend can do, readable without importing its framework.

One row per backend. Config rules, the launcher, plan, doctor, probe, parity and the trainer ask this table instead of
comparing names, so that a new backend needs only a folder in `moeport/backends` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Launcher = Literal["torchrun", "msrun"]
"""Command that starts ranks."""

Sharded = Literal["parameters", "gradients", "moments"]
"""What ranks that hold copies of parameters can divide: the parameters, their gradients, the optimiser's moments."""

_ALL = ("float32", "bfloat16", "float64")
_SINGLE_OR_HALF = ("float32", "bfloat16", "float16")
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class FusedKernel:
    """A fused operator that may stand in for a kernel of `Ops`, or for the step of the optimiser."""

    kernel: str
    """The kernel, or `adamw`."""
    name: str
    """The operator, as `backend.kernels` names it."""
    dtypes: tuple[str, ...] = _ALL
    """Types of the activations that its documentation names."""
    limits: str = ""
    """The sizes that its documentation allows, for readers; the composition serves all others."""


@dataclass(frozen=True)
class BackendFacts:
    """One backend. The defaults are those of a reference: one process, evaluation only, nothing compiled."""

    module: str
    """Module of its `Backend`."""
    cls: str
    """Name of that class."""
    framework: str
    """Package that it needs; importing it shows whether it works."""
    install: str
    """Command that installs the framework."""
    purpose: str
    """What it is for, in a few words."""
    dtypes: Mapping[str, tuple[str, ...]]
    """Compute types by device."""
    launcher: Launcher | None = None
    """Starts its ranks; None: it only runs in one process."""
    other_launchers: tuple[str, ...] = ()
    """Other launchers whose ranks it can join."""
    rendezvous: str = "moeport.comm.rendezvous"
    """Module whose `meeting_of` says where its ranks meet."""
    trains: bool = False
    """Whether it differentiates and has an optimiser."""
    compiles: bool = False
    """Whether it can compile a model."""
    graphs_on: tuple[str, ...] = ()
    """Devices on which it can record passes and replay them."""
    extensions: tuple[str, ...] = ()
    """Distributions that add devices to the framework where they are installed."""
    recomputes: bool = False
    """Whether it can recompute activations in the backward pass."""
    optimizers: tuple[str, ...] = ("adamw", "muon")
    """Values of `optimizer.name` that it has, if it trains."""
    shards: tuple[Sharded, ...] = ()
    """What it can divide among the ranks that hold copies, and does by default; nothing: each keeps whole copies."""
    casts_once: bool = False
    """Whether it keeps weights in a narrower compute type, cast once per update."""
    pads_rows: bool = False
    """Whether its compiled graphs pad the rows of each expert to a common number."""
    program_bytes: int = 0
    """Host memory of a process that has imported it and computed nothing."""
    fused: Mapping[str, tuple[FusedKernel, ...]] = field(default_factory=dict)
    """Fused operators by device. Each is tried before it is used; of several for a kernel, the first that passes."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices it runs on, the CPU first."""
        return tuple(self.dtypes)

    def dtypes_on(self, device: str) -> tuple[str, ...]:
        """Compute types on a device; for `auto`, those of all its devices."""
        if device != "auto":
            return self.dtypes[device]
        return tuple(dtype for dtype in _ALL if any(dtype in found for found in self.dtypes.values()))

    def fused_on(self, device: str) -> tuple[FusedKernel, ...]:
        """Fused operators on a device; for `auto`, those of all its devices."""
        found = self.fused.values() if device == "auto" else [self.fused.get(device, ())]
        return tuple(fused for each in found for fused in each)

    def joins(self, launcher: str) -> bool:
        """Whether its ranks can be started by this launcher."""
        return launcher in (self.launcher, *self.other_launchers)


_TORCH_NPU = (
    FusedKernel("rms_norm", "npu_rms_norm", _SINGLE_OR_HALF, "2 to 8 dimensions"),
    FusedKernel(
        "rope",
        "npu_rotary_mul",
        _SINGLE_OR_HALF,
        "heads of an even width below 896; fewer than 1000 sequences, and fewer than 1000 heads",
    ),
    FusedKernel(
        "attention",
        "npu_fusion_attention",
        _SINGLE_OR_HALF,
        "1 to 256 query heads, a multiple of the key and value heads; heads of width 1 to 768, in float32 a multiple "
        "of 4, and the same for values; 1 to 1,048,576 positions",
    ),
    FusedKernel("swiglu", "npu_swiglu", _SINGLE_OR_HALF, "an even width; 1 to 8 dimensions"),
    FusedKernel(
        "grouped_mlp",
        "npu_grouped_matmul",
        _SINGLE_OR_HALF,
        "up to 1024 experts on a rank; widths below 65,536",
    ),
    FusedKernel(
        "permute",
        "npu_moe_token_permute",
        _SINGLE_OR_HALF,
        "tokens choose experts, up to 512 each; fewer than 16,777,215 assignments",
    ),
    FusedKernel(
        "unpermute",
        "npu_moe_token_unpermute",
        _SINGLE_OR_HALF,
        "tokens choose experts, up to 512 each; fewer than 16,777,215 assignments",
    ),
    FusedKernel("adamw", "_fused_adamw_", ("float32",)),
)
"""Not run on hardware. From the documentation of op-plugin and, for permute and unpermute, of the CANN operators that
they call; the multiple of 4 is what torch-npu's own scaled_dot_product_attention asks for.
"""
_GROUPED = "compute capability 9 or 10; widths that are multiples of 8; fewer than 1024 experts"
_TORCH_CPU = tuple(
    FusedKernel(kernel, name, dtypes, limit)
    for kernel, limit in (("routed_mlp", "tokens choose experts"), ("grouped_mlp", ""))
    for name, dtypes in (("slices", _ALL), ("grouped_mm", ("float32", "bfloat16")), ("padded_bmm", _ALL))
)
_TORCH_CUDA = (
    FusedKernel("routed_mlp", "grouped_mm_triton", ("bfloat16",), f"{_GROUPED}; tokens choose experts"),
    FusedKernel("routed_mlp", "grouped_mm", ("bfloat16",), f"{_GROUPED}; tokens choose experts"),
    FusedKernel("routed_mlp", "mixed", ("bfloat16",), f"{_GROUPED}; tokens choose experts"),
    FusedKernel("routed_mlp", "triton", ("bfloat16",), "compute capability 8 or later; tokens choose experts"),
    FusedKernel(
        "routed_mlp",
        "sonicmoe",
        ("bfloat16",),
        "compute capability 9 or 10; widths that are multiples of 8; SwiGLU; tokens choose experts; no assignment is "
        "unrouted; backend.deterministic is false",
    ),
    FusedKernel("grouped_mlp", "grouped_mm_triton", ("bfloat16",), _GROUPED),
    FusedKernel("grouped_mlp", "grouped_mm", ("bfloat16",), _GROUPED),
    FusedKernel("grouped_mlp", "mixed", ("bfloat16",), _GROUPED),
    FusedKernel("grouped_mlp", "triton", ("bfloat16",), "compute capability 8 or later"),
    FusedKernel("rms_norm", "triton_rms_norm", _SINGLE_OR_HALF, "rows up to 8192 wide"),
    FusedKernel("rope", "triton_rope", _SINGLE_OR_HALF, "heads up to 8192 wide"),
    FusedKernel(
        "attention",
        "flash_attention_3",
        _HALF,
        "compute capability 9, the package flash-attn-3; heads with a width that is a multiple of 8 up to 256, with "
        "backend.deterministic up to 192, and the same for values",
    ),
    FusedKernel(
        "attention",
        "sdpa_cudnn",
        _HALF,
        "training without backend.deterministic; heads with a width that is a multiple of 8 up to 128, and the same "
        "for values",
    ),
    FusedKernel("attention", "sdpa_efficient", ("float32",), "fewer key and value heads than query heads"),
)
"""Not run on hardware. The limits are those of torch's grouped product and of the packages' documentation; the widths
of rms_norm and rope are those that a thread keeps in its registers on compute capability 9.0.
"""
_MINDSPORE_NPU = (
    FusedKernel("rms_norm", "mindspore.ops.rms_norm"),
    FusedKernel("swiglu", "mindspore.ops.swiglu"),
    FusedKernel("rope", "mindspore.ops.rotary_position_embedding"),
    FusedKernel("attention", "mindspore.ops.flash_attention_score", limits="values as wide as queries and keys"),
)
"""Not run on hardware."""

# program_bytes: VmHWM with torch 2.13 and MindSpore 2.10 for CPUs on Linux, after
# python -c "import moeport.training.run, moeport.backends.torch.backend; print(open('/proc/self/status').read())"
BACKENDS: Mapping[str, BackendFacts] = {
    "torch": BackendFacts(
        module="moeport.backends.torch.backend",
        cls="TorchBackend",
        framework="torch",
        install="pip install 'moeport[torch]'",
        purpose="training",
        dtypes=dict.fromkeys(("cpu", "cuda", "npu"), _ALL),
        launcher="torchrun",
        other_launchers=("openmpi", "slurm"),
        rendezvous="moeport.backends.torch.rendezvous",
        trains=True,
        compiles=True,
        graphs_on=("cuda",),
        extensions=("torch-npu",),
        recomputes=True,
        optimizers=("adamw", "muon", "adafactor"),
        shards=("parameters", "gradients", "moments"),
        casts_once=True,
        program_bytes=388_000_000,
        fused={"cpu": _TORCH_CPU, "npu": _TORCH_NPU, "cuda": _TORCH_CUDA},
    ),
    "mindspore": BackendFacts(
        module="moeport.backends.mindspore.backend",
        cls="MindSporeBackend",
        framework="mindspore",
        install="pip install 'moeport[mindspore]'",
        purpose="training",
        dtypes={"cpu": ("float32", "float64"), "npu": _ALL},
        launcher="msrun",
        trains=True,
        compiles=True,
        shards=("moments",),
        pads_rows=True,
        program_bytes=498_000_000,
        fused={"npu": _MINDSPORE_NPU},
    ),
    "numpy": BackendFacts(
        module="moeport.backends.numpy_ref.backend",
        cls="NumpyBackend",
        framework="numpy",
        install="pip install moeport",
        purpose="reference, forward only",
        dtypes={"cpu": ("float32", "float64")},
    ),
}
"""Facts by the value of `backend.name`."""

DEVICES = tuple(dict.fromkeys(device for facts in BACKENDS.values() for device in facts.devices))
"""Devices that some backend runs on."""


def training_backends() -> list[str]:
    """Names of the backends that train."""
    return [name for name, facts in BACKENDS.items() if facts.trains]


def default_backend(launcher: str) -> str:
    """The backend for ranks that a launcher started, if the user names none."""
    return next(name for name, facts in BACKENDS.items() if facts.joins(launcher))
