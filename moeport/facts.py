"""What each backend can do, readable without importing its framework.

One row per backend. Config rules, the launcher, plan, doctor, probe, parity and the trainer ask this table instead of
comparing names, so that a new backend needs only a folder in `moeport/backends` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["torchrun", "msrun"]
"""Command that starts ranks."""

_ALL = ("float32", "bfloat16", "float64")


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
    compiles_on_ranks: bool = False
    """Whether it can compile when several ranks train together."""
    extensions: tuple[str, ...] = ()
    """Packages, by the names of their distributions, that add devices to the framework, where they are installed."""
    recomputes: bool = False
    """Whether it can recompute activations in the backward pass."""
    shards: bool = False
    """Whether it can divide parameters, gradients and optimiser state among ranks, which is then the default."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices it runs on, the CPU first."""
        return tuple(self.dtypes)

    def dtypes_on(self, device: str) -> tuple[str, ...]:
        """Compute types on a device; for `auto`, those of all its devices."""
        if device != "auto":
            return self.dtypes[device]
        return tuple(dtype for dtype in _ALL if any(dtype in found for found in self.dtypes.values()))

    def joins(self, launcher: str) -> bool:
        """Whether its ranks can be started by this launcher."""
        return launcher in (self.launcher, *self.other_launchers)


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
        extensions=("torch-npu",),
        recomputes=True,
        shards=True,
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
        compiles_on_ranks=True,
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
