"""Options of the cluster benchmarks. Imports nothing heavy, since the command line shows their defaults as help."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeport.errors import UserError
from moeport.facts import BACKENDS, DEVICES, training_backends
from moeport.launch.machine import memory_bytes

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SIZE = re.compile(r"([0-9]+)([KMG]?)B?", re.IGNORECASE)
NCCL_NAMES = {"float": "float32", "double": "float64"}
"""Our names of types by those of nccl-tests, where they differ."""
TYPES = tuple(dict.fromkeys(name for facts in BACKENDS.values() for there in facts.dtypes.values() for name in there))
"""Types that some backend computes in."""
ALL = "all"
REDUCTIONS = ("sum", "max")
FACTOR = 4
"""Ratio of sizes, unless there is an increment."""


@dataclass(frozen=True)
class Sizes:
    """Bytes from the smallest to the largest, as the user wrote them."""

    minimum: str = "64K"
    maximum: str = "4M"
    factor: int | None = None
    """Ratio of one size to the next."""
    step: str | None = None
    """Difference of one size and the next, instead of a ratio."""

    def values(self) -> list[int]:
        """Each size, in bytes. Raises UserError for texts that are no sizes, or that contradict each other."""
        first, last = _bytes("--minbytes", self.minimum), _bytes("--maxbytes", self.maximum)
        if first > last:
            raise UserError(
                f"--minbytes {self.minimum} is above --maxbytes {self.maximum}; expected at most {self.maximum}, or a "
                "larger --maxbytes"
            )
        memory = memory_bytes()
        if memory is not None and last > memory:
            raise UserError(f"--maxbytes {self.maximum}: this machine has {memory / UNITS['G']:.1f}G of memory")
        if self.step is not None and self.factor is not None:
            raise UserError("--stepbytes and --stepfactor both set the next size; expected only one of them")
        if self.step is not None:
            return [*range(first, last + 1, _bytes("--stepbytes", self.step))]
        found = [first]
        while found[-1] * (self.factor or FACTOR) <= last:
            found.append(found[-1] * (self.factor or FACTOR))
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

    def check(self, backends: Collection[str] = tuple(training_backends())) -> None:
        """Raises UserError for a backend that is none of `backends`, and for a device or a timeout that cannot be."""
        if self.backend is not None and self.backend not in backends:
            raise UserError(f"--backend {self.backend}: expected {' or '.join(backends)}")
        if self.device not in ("auto", *DEVICES):
            raise UserError(f"--device {self.device}: expected {', '.join(('auto', *DEVICES))}")
        check_timeout(self.timeout)


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
class Variants:
    """Which variants of a collective are timed."""

    op: str = "sum"
    """Reduction of all_reduce: one of REDUCTIONS, or ALL."""
    root: str = "0"
    """Rank that broadcasts, or ALL."""

    def reductions(self, names: Sequence[str]) -> list[str]:
        """Reductions to time. Raises UserError for one that moeport lacks, where an operation in `names` reduces."""
        if not {"all_reduce", "reduce_scatter"} & {*names}:
            return ["sum"]
        if self.op not in (*REDUCTIONS, ALL):
            raise UserError(f"--op {self.op}: moeport reduces by {' and '.join(REDUCTIONS)}; expected one, or {ALL}")
        if self.op == "max" and "reduce_scatter" in names:
            raise UserError("--op max: reduce_scatter only sums; expected sum, or all_reduce alone")
        return list(REDUCTIONS) if self.op == ALL else [self.op]

    def roots(self, names: Sequence[str], ranks: int) -> list[int]:
        """Ranks that broadcast in turn. Raises UserError for one that is not there, where `names` has a broadcast."""
        if "broadcast" not in names:
            return [0]
        if self.root == ALL:
            return [*range(ranks)]
        if not re.fullmatch("[0-9]{1,9}", self.root) or int(self.root) >= ranks:
            raise UserError(f"--root {self.root}: expected a rank from 0 to {ranks - 1}, or {ALL}")
        return [int(self.root)]


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
    dtype: str
    """One of TYPES, a name of nccl-tests, or ALL."""
    variants: Variants
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
    dtype: str | None
    """None: the config's."""
    traffic: str
    """How tokens choose experts: `router`, or as in `Tokens`."""
    backward: bool
    target: Target
    files: Files


def dtypes(name: str, backend: str, device: str) -> list[str]:
    """The compute types of a name of ours or of nccl-tests; for ALL, all that the backend computes in.

    Raises UserError for a type that it does not compute in.
    """
    there = list(BACKENDS[backend].dtypes_on(device))
    found = NCCL_NAMES.get(name, name)
    if name == ALL:
        return there
    if found not in there:
        whose = f"{backend} on {device}" if found in TYPES else "moeport"
        raise UserError(f"--datatype {name}: {whose} computes in {', '.join(there)}; expected one of them, or {ALL}")
    return [found]


def one_dtype(name: str, backend: str, device: str) -> str:
    """The compute type of a name of ours or of nccl-tests. Raises UserError as `dtypes`, and for ALL."""
    if name == ALL:
        raise UserError(f"--datatype {ALL}: a layer computes in one type; expected one of {', '.join(TYPES)}")
    return dtypes(name, backend, device)[0]


def check_timeout(seconds: float) -> None:
    """Raises UserError for a timeout that is not a positive number."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"--timeout {seconds:g}: expected a number of seconds above 0")


def chunk_counts(text: str) -> list[int]:
    """The numbers in a text such as `1,2,4`. Raises UserError for other texts."""
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,9}", part) and int(part) for part in parts):
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


def _bytes(option: str, text: str) -> int:
    found = SIZE.fullmatch(text)
    if not found or int(found[1]) == 0:
        raise UserError(f"{option}: invalid size {text!r}; expected bytes such as 4096, 64K, 4M or 1G")
    return int(found[1]) * UNITS[found[2].upper()]
