"""Options of the cluster benchmarks. Imports nothing heavy, since the command line shows their defaults as help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeport.errors import UserError

DType = Literal["float32", "bfloat16", "float64"]
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Sizes:
    """Bytes from the smallest to the largest, as the user wrote them."""

    minimum: str = "64K"
    maximum: str = "4M"
    factor: int = 4

    def values(self) -> list[int]:
        """Each size, in bytes. Raises UserError if a text is not a size."""
        first, last = _bytes(self.minimum), _bytes(self.maximum)
        found = [first]
        while found[-1] * self.factor <= last:
            found.append(found[-1] * self.factor)
        return found


@dataclass(frozen=True)
class Runs:
    """How often each operation runs."""

    repetitions: int = 10
    """Timed runs."""
    warmup: int = 2
    """Untimed runs before them."""
    check: int = 1
    """1: compare the values of the last run; 0: do not."""


@dataclass(frozen=True)
class Target:
    """What the ranks compute with."""

    backend: str | None = None
    """None: the default of the launcher."""
    device: str = "auto"
    timeout: float = 120.0
    """Seconds that a collective may take."""


@dataclass(frozen=True)
class Files:
    """Where results are written besides the terminal; None: not written."""

    json_file: Path | None = None
    csv_file: Path | None = None
    plot_file: Path | None = None


@dataclass(frozen=True)
class Tokens:
    """The tokens of an expert exchange."""

    traffic: str = "uniform"
    """How tokens choose experts; see `moeport.plan.routes.expert_choices`."""
    experts: int = 64
    top_k: int = 8
    """Experts per token K."""
    width: int = 256
    """Width of a token D."""
    backward: bool = False
    """Run forward and backward pass together."""


@dataclass(frozen=True)
class LayerShape:
    """A layer: that of a config, overridden by the fields that are not None."""

    config_file: Path | None = None
    overrides: list[str] | None = None
    experts: int | None = None
    top_k: int | None = None
    width: int | None = None
    hidden: int | None = None


@dataclass(frozen=True)
class CommOptions:
    """All options of `moeport bench comm`."""

    operations: Sequence[str]
    """Empty: all."""
    sizes: Sizes
    runs: Runs
    dtype: DType
    tokens: Tokens
    chunks: str
    """Such as `1,2,4`."""
    target: Target
    files: Files


@dataclass(frozen=True)
class LayerOptions:
    """All options of `moeport bench moe`."""

    algorithms: Sequence[str]
    """Empty: all except auto."""
    shape: LayerShape
    chunks: str
    """Such as `1,2,4`."""
    sizes: Sizes
    runs: Runs
    dtype: DType | None
    """None: the config's."""
    traffic: str
    """How tokens choose experts: `router`, or as in `Tokens`."""
    backward: bool
    target: Target
    files: Files


def chunk_counts(text: str) -> list[int]:
    """The numbers in a text such as `1,2,4`. Raises UserError for other texts."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--chunks {text!r}: expected numbers of at least 1 such as 1,2,4")
    return [int(part) for part in parts]


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for a name that is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}; expected {', '.join(known)}")


def check_experts(experts: int, ranks: int) -> None:
    """Raises UserError if the experts cannot be divided evenly among the ranks."""
    if experts % ranks:
        raise UserError(f"--experts {experts}: not divisible among {ranks} ranks; expected a multiple of {ranks}")


def _bytes(text: str) -> int:
    digits, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not digits.isdigit() or unit not in UNITS or int(digits) == 0:
        raise UserError(f"invalid size {text!r}; expected bytes such as 4096, 64K, 4M or 1G")
    return int(digits) * UNITS[unit]
