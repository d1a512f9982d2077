"""The trial by time: which of the forms of a kernel that are right is the fastest. All frameworks share this.

A framework runs each contender on inputs of the sizes in question (`moeport.backends.sized`), in turn with the others,
for a few seconds at most. The incumbent, which is used without a trial, keeps its place unless another is faster by
`MARGIN`, so that noise does not flip a choice. The choice is kept in the cache folder for machines of the same kind,
one file for each case; a file that is damaged, or of another kind of machine, counts as none.

Kernels differ in their last bits, so that a choice by time could change what a run computes. Where results must be
reproducible, only contenders of the same bits may take each other's place (`Candidate.bits`).
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeport.data.cache import cache_dir
from moeport.errors import WriteError
from moeport.files import create_text, make_folder, write_text
from moeport.version import VERSION

COMPOSITION = "composition"
"""The name of the default form among the contenders."""
MARGIN, MARGIN_ON_CPU = 0.05, 0.10
"""A contender replaces the incumbent if it needs less time by at least this share; a CPU is shared with others."""
SECONDS, SECONDS_ON_CPU = 0.6, 1.2
"""About how long the rounds of a trial take; the first calls, which warm up, come before. On a CPU part of the work is
no measure of the whole, whose large arrays are mapped anew in each step and leave the cache.
"""
ROUNDS = 3, 15
"""Fewest and most rounds."""
HOPELESS = 2.0
"""A contender that takes this many times as long as the fastest in the first rounds leaves the trial."""
METHOD = 3
"""Of timing; choices that were made by another are not used. From 2 on, every run on a CPU has a new load; from 3 on, a
trial there takes longer.
"""
FOLDER = "kernels"
"""Of the cache."""

Sizes = tuple[tuple[str, int | str], ...]
"""What the speed of a kernel depends on besides its type: names with numbers or words, such as `(("E", 8), ...)`."""


@dataclass(frozen=True)
class Case:
    """What a choice is made for."""

    kernel: str
    dtype: str
    """Compute type."""
    sizes: Sizes
    same_bits: bool = False
    """Whether only forms with the bits of the incumbent will do."""

    @property
    def label(self) -> str:
        """The sizes, as in `E=8 D=512`."""
        return " ".join(f"{name}={value}" for name, value in self.sizes) + (" same bits" if self.same_bits else "")

    def __str__(self) -> str:
        return f"{self.kernel} in {self.dtype}, {self.label}"


@dataclass(frozen=True)
class Timed:
    """What a trial by time found."""

    chosen: str
    """Name of a contender."""
    milliseconds: Mapping[str, float]
    """Median time of each contender; those that failed are left out."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """What is wrong, at these sizes, with each contender that was left out."""

    def __str__(self) -> str:
        others = {name: took for name, took in self.milliseconds.items() if name != self.chosen}
        own = self.milliseconds[self.chosen]
        times = [f"{self.chosen} {own:.3g} ms", *(f"{name} {took:.3g} ms" for name, took in others.items())]
        return ", ".join([*times, *(f"{name} {why}" for name, why in self.failed.items())])


def race(
    incumbent: str, contenders: Mapping[str, Callable[[], float]], seconds: float = SECONDS, margin: float = MARGIN
) -> Timed:
    """Time contenders in turn, and choose.

    Args:
        incumbent: the one that stays unless another is faster by the margin.
        contenders: by name: runs once, forward and backward, and returns the seconds that the device took.
        seconds: about how long the rounds may take.
        margin: share of the incumbent's time.
    """
    for run in contenders.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in contenders}
    running, end = dict(contenders), time.perf_counter() + seconds
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, run in running.items():
            took[name].append(run())
        best = min(min(took[name]) for name in running)
        running = {name: run for name, run in running.items() if min(took[name]) < HOPELESS * best}
    medians = {name: statistics.median(took[name]) for name in contenders}
    fastest = min(medians, key=lambda name: medians[name])
    wins = medians[fastest] < (1 - margin) * medians[incumbent]
    return Timed(
        fastest if wins else incumbent, {name: float(f"{1e3 * median:.4g}") for name, median in medians.items()}
    )


@dataclass(frozen=True)
class Machine:
    """What the speed of kernels depends on besides the case."""

    device: str
    """Product name of the device, or model of the processor."""
    threads: int | None
    """That compute, on a CPU."""
    framework: str
    """Its name and version."""
    moeport: str = VERSION


def kept(machine: Machine, case: Case, contenders: frozenset[str]) -> Timed | None:
    """The choice that the cache holds; None if there is none among these contenders."""
    return _read(_file(machine, case, contenders), _key(machine, case, contenders))


def keep(machine: Machine, case: Case, contenders: frozenset[str], timed: Timed) -> Timed:
    """Put a choice into the cache, unless another process has done so meanwhile, and return the one that is there.

    So ranks that measure at the same time use the same form. Where the cache cannot be written, each uses its own, and
    the next process measures again.
    """
    file, key = _file(machine, case, contenders), _key(machine, case, contenders)
    text = json.dumps({"key": key, **asdict(timed)}, indent=2) + "\n"
    with suppress(WriteError):
        make_folder(file.parent)
        try:
            create_text(file, text)
        except FileExistsError:
            if other := _read(file, key):
                return other
            write_text(file, text)  # it is damaged
    return timed


def all_kept(machine: Machine) -> Iterator[tuple[Case, Timed]]:
    """Every choice in the cache for a kind of machine, in the order of the cases."""
    found = []
    for file in (cache_dir(None) / FOLDER).glob("*.json"):
        key = _json(file).get("key")
        if isinstance(key, dict) and key.get("machine") == asdict(machine) and (timed := _read(file, key)):
            with suppress(KeyError, TypeError, ValueError):
                sizes = tuple((str(name), value) for name, value in key["sizes"])
                found.append((Case(str(key["kernel"]), str(key["dtype"]), sizes, key["same_bits"] is True), timed))
    return iter(sorted(found, key=lambda each: str(each[0])))


def _key(machine: Machine, case: Case, contenders: frozenset[str]) -> dict[str, Any]:
    """What a choice depends on, as JSON gives it back."""
    sizes = [list(pair) for pair in case.sizes]
    return {
        "machine": asdict(machine),
        "kernel": case.kernel,
        "dtype": case.dtype,
        "sizes": sizes,
        "same_bits": case.same_bits,
        "contenders": sorted(contenders),
        "method": METHOD,
    }


def _file(machine: Machine, case: Case, contenders: frozenset[str]) -> Path:
    digest = hashlib.sha256(json.dumps(_key(machine, case, contenders)).encode()).hexdigest()[:24]
    return cache_dir(None) / FOLDER / f"{digest}.json"


def _read(file: Path, key: dict[str, Any]) -> Timed | None:
    """The choice in a file; None if it is damaged or for another key."""
    found = _json(file)
    chosen, took = found.get("chosen"), found.get("milliseconds")
    names = key.get("contenders")
    if found.get("key") != key or not isinstance(took, dict) or not isinstance(names, list):
        return None
    if (
        chosen not in (*names, COMPOSITION)
        or chosen not in took
        or not all(type(value) in (int, float) for value in took.values())
    ):
        return None
    failed = found.get("failed")
    reasons = {str(name): str(why) for name, why in failed.items()} if isinstance(failed, dict) else {}
    return Timed(str(chosen), {str(name): float(value) for name, value in took.items()}, reasons)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
