"""Runs the processes of a part, whatever becomes of them: they may fail, hang or be ended by a signal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeport.facts import BACKENDS
from moeport.kit.result import Crash, Outcome
from moeport.kit.task import EVENTS_FILE, VALUE_FILE, Task
from moeport.launch.launcher import NodeProcess, node_processes
from moeport.launch.local import POLL_SECONDS, LocalJob, free_port, local_job
from moeport.processes import ending_of, last_line, python_path
from moeport.reading import parse_json

MAX_CRASHES = 5
"""Cases that may end the process before the part is given up."""
GRACE_SECONDS = 5.0
"""Time that a process has to end by itself when it is asked to."""
PROGRESS_SECONDS = 15.0
"""Between two lines that say how far a part has come."""
HEAD, TAIL = 8_000, 24_000
"""Characters that are kept of what a process prints, at its beginning and at its end."""
INTERRUPTED_ENDING = "interrupted"


@dataclass
class Watch:
    """How the kit's own process looks at the processes of a part."""

    interrupted: Callable[[], bool] = lambda: False
    progress: Callable[[int], None] = lambda _: None
    """Is told the number of cases that are done."""


def run_stage(task: Task, seconds: float, cases: bool, watch: Watch) -> Outcome:
    """Run one stage, and start it again after a case that has ended its process.

    Args:
        task: what to run; its folder is empty or has what an earlier process left.
        seconds: time limit of the whole stage.
        cases: whether it may be started again.
        watch: see Watch.
    """
    folder, deadline = Path(task.folder), time.monotonic() + seconds
    crashes: list[Crash] = []
    attempt = 0
    while True:
        task.write()
        ending = _run(task, folder / f"attempt-{attempt}", deadline, seconds, watch)
        events = _events(folder)
        begun = _unfinished(events)
        if ending is None or not cases or begun is None or ending == INTERRUPTED_ENDING:
            return Outcome(_value(folder), events, crashes, ending)
        crashes.append(Crash(begun, ending))
        if time.monotonic() > deadline or len(crashes) >= MAX_CRASHES:
            return Outcome(None, events, crashes, ending)
        task, attempt = replace(task, after=begun), attempt + 1


def _run(task: Task, output: Path, deadline: float, seconds: float, watch: Watch) -> str | None:
    """Run the processes once. Returns why they ended before they were done; None if they were done."""
    output.mkdir()
    folder = Path(task.folder)
    threads = {"OMP_NUM_THREADS": "1"} if task.ranks > 1 else {}  # unless the user has set it
    with local_job(_processes(task), output, threads, cwd=folder) as job:
        ending = _wait(job, deadline, seconds, folder, watch)
        failed = job.failed()  # before the others are ended because of it
        if ending:
            job.kill(GRACE_SECONDS)
    is_done = (folder / VALUE_FILE).is_file() and (failed is None or task.ranks == 1)  # rank 0 writes it for itself
    if ending or is_done:
        return ending
    code = 0 if failed is None else job.processes[failed].returncode
    said = _reason(_excerpt(job.outputs[failed or 0]))
    many = failed is not None and len(job.processes) > 1
    where = f"rank {failed} of {len(job.processes)} " if many else ""
    return f"{where}ended with {ending_of(code)}{': ' if said else ''}{said}"


def _processes(task: Task) -> list[NodeProcess]:
    """The processes of a task. They run in its folder, and find the packages that this process has found."""
    command = ["kit", "part", task.folder]
    path = {"PYTHONPATH": python_path()}
    if task.ranks == 1:
        return [NodeProcess(0, [sys.executable, "-m", "moeport", *command], path)]
    launcher = BACKENDS[task.backend].launcher or "torchrun"
    started = node_processes(launcher, 1, task.ranks, "127.0.0.1", command, free_port())
    return [replace(each, environment=each.environment | path) for each in started]


def _wait(job: LocalJob, deadline: float, seconds: float, folder: Path, watch: Watch) -> str | None:
    """Wait for the end. Returns a reason to end the processes; None if they have ended."""
    told = time.monotonic()
    while True:
        codes = job.codes()
        if None not in codes:
            return None
        if watch.interrupted():
            return INTERRUPTED_ENDING
        if time.monotonic() > deadline:
            return f"no end within {seconds:g} s"
        if any(codes):  # the other ranks have some seconds to end by themselves
            time.sleep(min(GRACE_SECONDS, 20 * POLL_SECONDS))
            return None
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            watch.progress(sum("end" in event for event in _events(folder)))
        time.sleep(POLL_SECONDS)


def _value(folder: Path) -> Any:
    with suppress(OSError, ValueError):
        return parse_json((folder / VALUE_FILE).read_bytes())
    return None


def _events(folder: Path) -> list[Any]:
    """What was noted; a last line that was cut short is left out."""
    found = []
    with suppress(OSError):
        for line in (folder / EVENTS_FILE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(parse_json(line))
    return found


def _unfinished(events: list[Any]) -> str | None:
    """The case that had begun and not ended."""
    last: dict[str, Any] = events[-1] if events else {}
    return last.get("begin")


def _reason(text: str) -> str:
    """The last error that a process printed, or else its last line."""
    errors = [line for line in text.splitlines() if line.startswith(("error:", "internal error:"))]
    return last_line(errors[-1] if errors else text)[:500]


def log_of(folder: Path) -> str:
    """What the processes of a stage printed, those of each attempt and rank one after the other."""
    parts = []
    for file in sorted(folder.glob("attempt-*/**/*")):
        if file.is_file() and (file.name.startswith("output.") or file.suffix == ".log"):
            text = _excerpt(file)
            if text.strip():
                parts.append(f"--- {file.relative_to(folder)}\n{text.rstrip()}\n")
    return "\n".join(parts)


def _excerpt(file: Path) -> str:
    """The beginning and the end of a file, in bounded memory."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size <= HEAD + TAIL:
            return opened.read(HEAD + TAIL).decode(errors="replace")
        head = opened.read(HEAD).decode(errors="replace")
        opened.seek(-TAIL, os.SEEK_END)
        return f"{head}\n… {size - HEAD - TAIL:,} bytes left out …\n{opened.read(TAIL).decode(errors='replace')}"
