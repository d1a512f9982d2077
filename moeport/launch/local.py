"""Processes of a job on this machine, which end with the block that starts them; what they print goes to files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moeport.launch.launcher import NodeProcess

LAUNCHERS = ("RANK", "LOCAL_RANK", "MS_ROLE", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID")
"""Environment variables from which a process knows that a launcher started it."""
GRACE_SECONDS = 15.0
"""Time in which the other ranks may end by themselves after one has failed."""
MARK = "MOEPORT_LOCAL_JOB"
"""Environment variable by which the processes of a job are found."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class LocalJob:
    """Processes that have been started."""

    processes: Sequence[subprocess.Popen[bytes]]
    outputs: Sequence[Path]
    """What each prints, both streams together."""
    mark: str

    def codes(self) -> list[int | None]:
        """Exit codes; None for a process that runs."""
        return [process.poll() for process in self.processes]

    def failed(self) -> int | None:
        """Index of the first process that has failed; None so far."""
        return next((i for i, code in enumerate(self.codes()) if code), None)

    def wait(self) -> int | None:
        """Wait until a process fails or all have ended. Returns the index of the one that failed."""
        while (failed := self.failed()) is None and None in self.codes():
            time.sleep(POLL_SECONDS)
        return failed

    def terminate(self) -> None:
        """Ask all of them to end."""
        for process in self.processes:
            process.terminate()

    def kill(self, grace: float) -> None:
        """Ask all of them to end, and end those that have not done so after some seconds."""
        self.terminate()
        self._await(grace)
        for process in self.processes:
            process.kill()

    def end(self) -> None:
        """Give the processes that still run time to end, then end them and everything that they have started."""
        self._await(GRACE_SECONDS)
        self.kill(GRACE_SECONDS)
        for process in self.processes:
            process.wait()
        self._kill_marked()

    def _await(self, seconds: float) -> None:
        """Wait until all have ended, or for some seconds."""
        deadline = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _kill_marked(self) -> None:
        """Kill the ranks that outlived their launcher; torchrun starts them in sessions of their own."""
        marked = f"{MARK}={self.mark}".encode()
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if marked in file.read_bytes().split(b"\0"):
                    os.kill(int(file.parent.name), signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def local_job(
    processes: Sequence[NodeProcess],
    folder: Path,
    defaults: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[LocalJob]:
    """Start processes; at the end of the block they have ended.

    Args:
        processes: the processes, see `moeport.launch.launcher.node_processes`.
        folder: for what they print, and for msrun's logs.
        defaults: environment variables that are set unless the user has set them.
        cwd: the folder that they run in; default: this process's.
    """
    mark = uuid.uuid4().hex
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    started: list[subprocess.Popen[bytes]] = []
    job = LocalJob(started, [folder / f"output.{i}" for i in range(len(processes))], mark)
    try:
        for process, output in zip(processes, job.outputs, strict=True):
            arguments = [f"--log_dir={folder}" if a.startswith("--log_dir=") else a for a in process.command]
            own = {**(defaults or {}), **inherited, MARK: mark, **process.environment}
            with output.open("wb") as file:
                started.append(
                    subprocess.Popen(
                        arguments, env=own, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )  # in a session of its own, or Ctrl-C would reach the ranks twice
                )
        yield job
    except BaseException:
        job.terminate()
        raise
    finally:
        job.end()
