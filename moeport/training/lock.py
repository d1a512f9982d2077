"""The lock on a run folder: one run at a time trains in it.

It is a file with the host and the process that trains, created so that only one process can succeed, on network storage
too. It does not outlive its process: where that can be looked up, on the same host, it is; elsewhere the file tells,
which a running process touches every few seconds. Ages are differences of times that the file server gave.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from moeport.errors import UserError
from moeport.files import create_text, make_folder, process_runs, remove_leftovers, take_away, writing

LOCK_FILE = ".lock"
BEAT_SECONDS = 10.0
"""Time between two signs of life."""
SILENT_SECONDS = 120.0
"""Time without a sign of life after which a process of another host has ended."""
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """The process that a lock belongs to."""

    host: str
    """Name of its host."""
    machine: str
    """What sets this start of the host, and the container on it, apart from others; empty if unknown."""
    pid: int
    """Its number."""
    started: str
    """When it started, in the units of its host; it sets apart processes that had the same number."""
    since: str
    """When it took the lock, for people."""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} since {self.since}"

    @property
    def runs(self) -> bool | None:
        """Whether it runs; None if this process cannot know."""
        if self.host != socket.gethostname() or not self.machine or self.machine != _machine():
            return None
        return process_runs(self.pid) and _started(self.pid) == self.started


class RunLock:
    """Holds the lock of a run folder; a context manager.

    Args:
        run_dir: the folder; made if it is missing, and removed if it is still empty at the end.
        say: prints a line if it takes long.

    Raises UserError on entry if another process trains in the folder, and WriteError if it cannot be written to.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]):
        self.run_dir, self.say, self.path = run_dir, say, run_dir / LOCK_FILE
        self._text, self._made = "", False
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        self._made = not self.run_dir.exists()
        make_folder(self.run_dir)
        try:
            self._acquire()
        except BaseException:
            self._leave_nothing()
            raise
        remove_leftovers(self.run_dir)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.is_held:
            with suppress(OSError):
                self.path.unlink()
        self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Remove a folder that was made here and is still empty."""
        if self._made:
            with suppress(OSError):
                self.run_dir.rmdir()

    @property
    def is_held(self) -> bool:
        """Whether the lock is still that of this process."""
        try:
            return self.path.read_text(encoding="utf-8") == self._text
        except (OSError, ValueError):
            return False

    def check(self) -> None:
        """Raises UserError if another process has taken the lock, or somebody has deleted it."""
        if not self.is_held:
            found = _read(self.path)
            taken = f"was taken over by {found[0]}" if found and found[0] else "is gone"
            raise UserError(
                f"run.dir: the lock {self.path} {taken}, so this run stops before it writes there again; continue with "
                "--resume once no other process trains in the folder"
            )

    def _acquire(self) -> None:
        self._text = json.dumps(asdict(_this_process())) + "\n"
        while True:
            try:
                create_text(self.path, self._text)
            except FileExistsError:
                found = _read(self.path)
                if found and not self._is_over(found[0]):
                    raise _refusal(self.path, found[0]) from None
                if found:
                    self._take_over(found[1])
            else:
                return

    def _is_over(self, holder: Holder | None) -> bool:
        """Whether the process of a lock has ended; waits for a sign of life if it cannot be looked up."""
        if holder and holder.runs is not None:
            return not holder.runs
        first, said = _touched(self.path), False
        while (touched := _touched(self.path)) is not None:
            if touched != first:
                return False
            if self._server_time() - touched > SILENT_SECONDS:
                return True
            if not said:
                self.say(f"waiting for a sign of life, at most {SILENT_SECONDS:.0f} s: {self.path} belongs to {holder}")
                said = True
            time.sleep(POLL_SECONDS)
        return True

    def _take_over(self, text: str | None) -> None:
        """Remove the lock of a process that has ended, unless another process was faster."""
        with _alone(self.run_dir):
            if _text(self.path) != text:
                return
            try:
                aside = take_away(self.path)
            except FileNotFoundError:
                return
            if _text(aside) != text:  # storage on which processes cannot be kept apart
                with suppress(OSError):
                    os.link(aside, self.path)
            with suppress(OSError):
                aside.unlink()

    def _server_time(self) -> float:
        """The time on the storage, where the lock's was taken too."""
        probe = self.path.with_name(f"{LOCK_FILE}.{socket.gethostname()}-{os.getpid()}")
        with writing(probe):
            try:
                probe.write_bytes(b"")
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a hiccup of the storage; the next beat may come through
                if self.is_held:
                    os.utime(self.path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of the same block, where the storage can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refuse_locked(run_dir: Path) -> None:
    """Refuse a folder in which a process of this host trains, before anything else is done.

    Raises UserError, which names it.
    """
    path = run_dir / LOCK_FILE
    found = _read(path)
    if found and found[0] and found[0].runs:
        raise _refusal(path, found[0])


@dataclass(frozen=True)
class Life:
    """What the lock of a run folder tells about the process that trains in it."""

    holder: str
    """Who holds it; empty where there is no lock."""
    runs: bool
    """Whether it runs, as far as can be told: on another host, whether it gave a sign of life lately."""


def life(run_dir: Path) -> Life:
    """Whether a process trains in a folder. Only reads, so that it disturbs nobody."""
    path = run_dir / LOCK_FILE
    found = _read(path)
    if found is None:
        return Life("", False)
    holder = found[0]
    runs = holder.runs if holder else None
    if runs is None:
        touched = _touched(path)
        runs = touched is not None and time.time() - touched < SILENT_SECONDS
    return Life(str(holder or "another process"), runs)


def _refusal(path: Path, holder: Holder | None) -> UserError:
    return UserError(
        f"run.dir: {path.parent} is in use by {holder or 'another process'}; wait until it has ended or stop it, or "
        f"choose another folder with --set run.dir=FOLDER (if there is no such process, delete {path})"
    )


def _read(path: Path) -> tuple[Holder | None, str | None] | None:
    """Who holds a lock, or None if that is not to be made out, and its text; None if there is none."""
    if not os.path.lexists(path):
        return None
    text = _text(path)
    try:
        values = json.loads(text or "")
        kinds = {name: int if name == "pid" else str for name in Holder.__dataclass_fields__}
        if isinstance(values, dict) and all(type(values.get(name)) is kind for name, kind in kinds.items()):
            return Holder(**{name: values[name] for name in kinds}), text
    except (ValueError, RecursionError):
        pass
    return None, text


def _text(path: Path) -> str | None:
    """What a lock says; None if it cannot be read, as that of another user may be."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None


def _touched(path: Path) -> float | None:
    """When the holder gave a sign of life; None if the lock is gone. Opening makes network storage look again."""
    _text(path)
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def _this_process() -> Holder:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(socket.gethostname(), _machine(), pid, _started(pid), since)


def _machine() -> str:
    """This start of the machine, and the process namespace on it: what a process number is valid in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown" if not Path("/proc/self").exists() else ""


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the host did; empty where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
