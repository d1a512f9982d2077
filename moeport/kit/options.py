"""The options of `moeport kit`. Imports nothing heavy, since the command line reads it for its help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeport.errors import UserError, choices
from moeport.facts import BACKENDS, DEVICES, training_backends

PART_NAMES = (
    "doctor",
    "device",
    "probe",
    "conformance",
    "kernels",
    "exchange",
    "determinism",
    "comm",
    "train",
    "parity",
)
"""The parts, in the order in which they run."""


@dataclass(frozen=True)
class KitOptions:
    """What the user asked for."""

    output: Path
    backend: str
    device: str = "auto"
    ranks: int | None = None
    """None: one per device; on a CPU, CPU_RANKS."""
    parts: tuple[str, ...] = PART_NAMES
    quick: bool = False

    def check(self) -> None:
        """Raises UserError for a backend or a device that there is not."""
        if self.backend not in training_backends():
            raise UserError(f"--backend {self.backend}: {choices(self.backend, training_backends())}")
        known = ("auto", *BACKENDS[self.backend].devices)
        if self.device not in known:
            what = f"not a device of {self.backend}; " if self.device in DEVICES else ""
            raise UserError(f"--device {self.device}: {what}{choices(self.device, known)}")
        if self.ranks is not None and self.ranks < 1:
            raise UserError(f"--ranks {self.ranks}: expected a number of at least 1")


def selected(parts: str, skip: str) -> tuple[str, ...]:
    """The parts to run, in their order.

    Args:
        parts: names with commas; empty: all.
        skip: names with commas that are left out.

    Raises UserError for an unknown name, and where nothing is left.
    """
    wanted, without = _names("--parts", parts), _names("--skip", skip)
    left = tuple(name for name in PART_NAMES if (not wanted or name in wanted) and name not in without)
    if not left:
        raise UserError("--parts and --skip leave no part; name at least one of " + ", ".join(PART_NAMES))
    return left


def _names(option: str, text: str) -> Sequence[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PART_NAMES:
            raise UserError(f"{option} {name}: {choices(name, PART_NAMES)}")
    return names
