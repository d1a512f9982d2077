"""How PyTorch's threads wait for each other, and what is done about it on a busy machine.

PyTorch's Linux packages compute with the threads of libgomp. At the end of each parallel region these spin, for up to
300,000 turns, and only then sleep. While every thread has a core that is the fastest way to wait. Where another process
takes a core away, they spin for milliseconds at each of thousands of small regions, and a step takes 10 to 40 times as
long. With more threads than cores libgomp spins for 100 turns instead, so another team of threads, which does nothing,
shortens the waiting. The number of threads that compute stays the same, and so do results, to the bit.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from moeport.backends.contention import Watch

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables by which a user decides how threads wait, or limits how many there may be."""
MAPS = Path("/proc/self/maps")


class IdleTeam:
    """A team of libgomp's threads that does nothing, so that there are more threads than cores."""

    busy = "other programs keep the machine busy: threads now sleep while they wait; results stay the same"
    calm = "the machine is calm again: threads now spin while they wait; results stay the same"

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        self._end: threading.Event | None = None

    def start(self) -> None:
        """Start the team, unless there is one."""
        if self._end is None:
            self._end = threading.Event()
            threading.Thread(target=self._hold, args=(self._end,), name="moeport-idle-team", daemon=True).start()

    def stop(self) -> None:
        """End the team, if there is one."""
        if self._end is not None:
            self._end.set()
            self._end = None

    def _hold(self, end: threading.Event) -> None:
        """Have a team until `end`; libgomp ends a team with the thread that started it."""
        size = self.library.omp_get_num_procs() + 1
        nothing = ctypes.cast(self.library.omp_get_thread_num, ctypes.c_void_p)  # a function without a side effect
        self.library.GOMP_parallel(nothing, None, size, 0)
        end.wait()


def find_library(maps: Path = MAPS, package: Path = Path(torch.__file__).parent) -> Path | None:
    """The libgomp that PyTorch computes with; None if it uses another library, or if that cannot be told.

    Args:
        maps: what this process has mapped, as Linux describes it.
        package: the folder of PyTorch, which may have a libgomp of its own.
    """
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    mapped = {Path(line[line.index("/") :]) for line in lines if "/" in line and "omp" in line}
    found = sorted(path for path in mapped if path.name.startswith("libgomp"))
    folders = {package.resolve(), package.resolve().with_name("torch.libs")}
    own = [path for path in found if folders & {*path.resolve().parents}]
    if own:
        return own[0]
    others = [path for path in mapped if path.name.startswith(("libiomp", "libomp"))]
    return found[0] if len(found) == 1 and not others else None


@functools.cache
def watch() -> Watch | None:
    """Watch for a busy machine from now on, once per process; None where there is nothing to do.

    That is: a single thread, a library other than libgomp, or a user who has decided how threads wait.
    """
    library = find_library() if torch.get_num_threads() > 1 and not decided() else None
    if library is None:
        return None
    found = Watch(IdleTeam(ctypes.CDLL(str(library))))
    found.start()
    return found


os.register_at_fork(after_in_child=watch.cache_clear)


def decided(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Those of SETTINGS that the user has set, with their values."""
    return [f"{name}={environment[name]}" for name in SETTINGS if environment.get(name)]


def threads_given(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user, or a launcher such as torchrun, has set the number of threads."""
    return any(environment.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def describe_threads() -> str:
    """How many threads compute, and how they wait for each other."""
    count = torch.get_num_threads()
    if count == 1:
        return "1"
    if settings := decided():
        return f"{count}, which wait for each other as {', '.join(settings)} says"
    if watch() is None:
        return f"{count}, which wait for each other as their library does, which is not libgomp"
    return f"{count}, which spin while they wait for each other, and sleep while other programs keep the machine busy"
