"""What `moeport kit` does: runs the parts one after the other, and packs what they have found, whatever happens."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from moeport.ascend import installed
from moeport.kit.checks.device import usable
from moeport.kit.corpus import write_corpus
from moeport.kit.options import KitOptions
from moeport.kit.pack import Contents, PartRecord, describe_contents, write_kit
from moeport.kit.parts import PARTS, Part
from moeport.kit.private import Scrubber, kept_variables
from moeport.kit.result import WORDS, Outcome, Result
from moeport.kit.supervise import Watch, log_of, run_stage
from moeport.kit.task import Task, describe
from moeport.launch.machine import accelerators_seen, memory_bytes, processor
from moeport.processes import usable_cores
from moeport.stopping import INTERRUPTED, end_at_once, handled, install, restore

CPU_RANKS = 4
"""Ranks on a CPU, which has no devices to count."""
MAX_FACTOR = 16
"""Ranks beyond which the kit leaves devices out: more than a machine has, and a limit for wrong counts."""
DEVICE = next(part for part in PARTS if part.name == "device")

Say = Callable[[str], None]


class Interruption:
    """Remembers that a signal asked for an end; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.asked:
            end_at_once()
        self.asked = True


@dataclass
class _Run:
    """The kit while it runs."""

    options: KitOptions
    folder: Path
    say: Say
    interruption: Interruption
    found: dict[str, Any] = field(default_factory=dict)
    """What the part `device` has found."""

    @property
    def ranks(self) -> int:
        """Of parts that run on all of them."""
        if self.options.ranks is not None:
            return self.options.ranks
        units = len(self.found.get("units", ()))
        return min(units, MAX_FACTOR) if units else CPU_RANKS if self.found.get("kind") == "cpu" else 1

    def tasks(self, part: Part) -> list[Task]:
        """The stages of a part; one on all ranks is left out where there is only one rank."""
        stages = [stage for stage in part.stages if stage == "one" or self.ranks > 1 or len(part.stages) == 1]
        return [
            Task(
                part=part.name,
                stage=number,
                backend=self.options.backend,
                device=self.options.device,
                dtypes=usable(self.found),
                ranks=1 if stage == "one" else self.ranks,
                all_ranks=self.ranks,
                quick=self.options.quick,
                folder=str(self.folder / f"{part.name}-{number}"),
            )
            for number, stage in enumerate(stages)
        ]


def run_kit(options: KitOptions, say: Say) -> int:
    """Run the parts and write the file.

    Args:
        options: what the user asked for, checked.
        say: takes each line of progress.

    Returns: the exit code: 0 no part failed, 1 one did, 130 interrupted; the file is written in any case.

    Raises WriteError where the file cannot be written.
    """
    for line in describe_contents():
        say(line)
    with _interruptible() as interruption, tempfile.TemporaryDirectory(prefix="moeport-kit-") as name:
        run = _Run(options, Path(name), say, interruption)
        contents = Contents(_asked(options), {}, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
        for record in _parts(run):
            contents.parts.append(record)
        contents.interrupted = interruption.asked
        contents.asked = {**contents.asked, "ranks": run.ranks}
        contents.machine = _machine(run.found)
        write_kit(options.output, contents, Scrubber(folders={name: "<kit>", os.path.realpath(name): "<kit>"}))
    return _finish(contents, options.output, say)


@contextmanager
def _interruptible() -> Iterator[Interruption]:
    """Signals that ask for an end are remembered in the block."""
    interruption = Interruption()
    before = install(interruption)
    try:
        with handled():
            yield interruption
    finally:
        restore(before)


def _parts(run: _Run) -> Iterator[PartRecord]:
    """Run the parts. The device is looked at in any case, since the others depend on it."""
    wanted = [part for part in PARTS if part.name in run.options.parts or part == DEVICE]
    for number, part in enumerate(wanted, start=1):
        run.say(f"{number}/{len(wanted)} {part.name}: {part.title}")
        start = time.monotonic()
        result, log = _run_part(run, part)
        seconds = time.monotonic() - start
        if part == DEVICE and isinstance(result.data, Mapping):
            run.found = dict(result.data)
        run.say(f"    {result.verdict} in {seconds:.0f} s: {result.summary}")
        yield PartRecord(part.name, part.title, result, seconds, log)


def _run_part(run: _Run, part: Part) -> tuple[Result, str]:
    """The result of a part, and what its processes printed."""
    if reason := _reason_to_skip(run, part):
        return Result("skipped", reason), ""
    outcomes: list[Outcome] = []
    logs: list[str] = []
    for task in run.tasks(part):
        if part.fallback and outcomes and judged(part, outcomes).verdict == "pass":
            break
        folder = Path(task.folder)
        folder.mkdir()
        if part.text:
            write_corpus(folder)
        watch = Watch(lambda: run.interruption.asked, lambda done: run.say(f"    {done:,} cases") if done else None)
        outcomes.append(run_stage(task, part.minutes * 60.0, part.cases, watch))
        logs.append(log_of(folder))
        if run.interruption.asked or (outcomes[-1].ending and not (part.cases or part.fallback)):
            break
    return judged(part, outcomes), "\n".join(logs)


def judged(part: Part, outcomes: Sequence[Outcome]) -> Result:
    """The result of a part; one that was ended is failed, with what it had found until then."""
    ending = next((outcome.ending for outcome in outcomes if outcome.ending), None)
    whole = [outcome for outcome in outcomes if outcome.value is not None or outcome.events]
    if ending and not (part.partial and whole):
        return Result("fail", ending)
    try:
        result = part.module().judge(whole)
    except Exception as error:  # whatever it was that the processes have left
        return Result("fail", f"the results cannot be read: {describe(error)}")
    if ending:
        return Result("fail", f"{ending}; {result.summary}", result.figures, result.tables, result.data, result.files)
    return result


def _reason_to_skip(run: _Run, part: Part) -> str | None:
    if run.interruption.asked:
        return "interrupted before it began"
    if part.name in ("doctor", "device"):
        return None
    if not usable(run.found):
        return "the device cannot be used"
    if run.ranks < part.least_ranks:
        return f"needs {part.least_ranks} ranks, and there {'is' if run.ranks == 1 else 'are'} {run.ranks}"
    return None


def _asked(options: KitOptions) -> dict[str, Any]:
    return {
        "backend": options.backend,
        "device": options.device,
        "ranks": options.ranks,
        "quick": options.quick,
        "parts": list(options.parts),
    }


def _machine(found: Mapping[str, Any]) -> dict[str, Any]:
    """The machine in general terms."""
    memory, ascend = memory_bytes(), installed.machine()
    return {
        "device": found.get("device", "none that can be used"),
        "devices": [unit["name"] for unit in found.get("units", ())],
        "listed by the system": accelerators_seen(),
        "versions": {"python": platform.python_version(), **found.get("versions", {})},
        "CANN": ", ".join(each.version or "a folder without a version" for each in ascend.cann) or "none found",
        "Ascend driver": ascend.driver or "none found",
        "platform": platform.platform(),
        "processor": processor().model,
        "cores": usable_cores(),
        "memory": "unknown" if memory is None else f"{math.floor(memory / 2**30)} GiB",
        "variables": kept_variables(os.environ),
    }


def _finish(contents: Contents, path: Path, say: Say) -> int:
    """Say how it went. Returns the exit code."""
    names = {verdict: [p.name for p in contents.parts if p.result.verdict == verdict] for verdict in WORDS}
    others = [f"; {WORDS[v]}: {', '.join(found)}" for v, found in names.items() if found and v != "pass"]
    say(f"{len(names['pass'])} passed{''.join(others)}")
    say(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB); look at it with: moeport kit show {path} -o kit.html")
    if contents.interrupted:
        return INTERRUPTED
    return 1 if names["fail"] else 0
