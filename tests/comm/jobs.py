"""Jobs of several processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.ports import free_port
from tests.jobs.ranks import START, Ranks, settings

ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    launcher: subprocess.Popen | Ranks
    folder: Path
    started: float

    def wait(self, timeout: float) -> int:
        return self.launcher.wait(timeout)

    def pids(self) -> dict[int, int]:
        """By rank, of the processes that have come so far."""
        return {int(path.suffix[1:]): int(path.read_text()) for path in self.folder.glob("pid.*") if path.read_text()}

    def output(self) -> str:
        """What the workers wrote."""
        return self.output_of(self.folder)

    @staticmethod
    def output_of(folder: Path) -> str:
        """What the workers wrote, without the launcher's copy of it where it makes one."""
        logs = sorted(folder.glob("logs/worker_*.log")) or [folder / "output"]
        return "".join(path.read_text(errors="replace") for path in logs)

    def left(self) -> list[int]:
        """Processes of the job that still run."""
        return [pid for pid in self.pids().values() if runs(pid)]

    def end(self) -> None:
        """Leave no process behind. Workers of msrun are in sessions of their own."""
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if isinstance(self.launcher, Ranks):
            self.launcher.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait(30)


def start(backend: str, size: int, arguments: list[str], folder: Path, **environment: str) -> Job:
    """Run `python ARGUMENTS` in `size` processes that are forked once the framework is imported."""
    return _forked(backend, size, 1, arguments, folder, environment)


def start_on_nodes(size: int, nodes: int, arguments: list[str], folder: Path) -> Job:
    """The same with torch, as if the ranks were on several nodes."""
    return _forked("torch", size, nodes, arguments, folder, {})


def _forked(
    backend: str, size: int, nodes: int, arguments: list[str], folder: Path, environment: dict[str, str]
) -> Job:
    (folder / "logs").mkdir(parents=True)
    ranks = START[backend](size, nodes, arguments, folder / "logs", free_port(), environment)
    return Job(ranks, folder, time.monotonic())


def launch(backend: str, size: int, arguments: list[str], folder: Path, **environment: str) -> Job:
    """The same as a user starts it: under torchrun for torch and msrun for mindspore."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m"]
    if backend == "torch":
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *arguments]
    else:
        command += ["mindspore.parallel.cluster.run", f"--worker_num={size}", f"--local_worker_num={size}"]
        command += [f"--master_port={free_port()}", f"--log_dir={folder / 'logs'}", "--join=True"]
        command += ["--cluster_time_out=120", "python", *arguments]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (folder / "output").open("w") as output:
        launcher = subprocess.Popen(
            command,
            env=settings() | {"PATH": path} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(launcher, folder, time.monotonic())


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
