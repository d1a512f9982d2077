"""The commands that start a training job: torchrun or msrun on each node, and a Slurm script around them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from moeport.launch import last_words, npu
from moeport.launch.npu import NpuJob
from moeport.launch.orphans import started_here
from moeport.launch.script import slurm_script
from moeport.stopping import INTERRUPTED, handled, install, restore

MODULES = {"torchrun": "torch.distributed.run", "msrun": "mindspore.parallel.cluster.run"}
PORTS = {"torchrun": 29500, "msrun": 8118}
"""Default rendezvous port of each launcher."""
SAID_AGAIN = 3
"""Number of different last sentences of ranks that are repeated."""
SAVING_SECONDS = 600
"""How long torchrun waits for ranks that are asked to end and save a checkpoint first."""


@dataclass(frozen=True)
class LaunchSpec:
    """A job with the same number of ranks on each node."""

    launcher: Literal["torchrun", "msrun"]
    nodes: int
    ranks_per_node: int
    arguments: tuple[str, ...]
    """Arguments of `moeport`."""
    max_restarts: int = 0
    """How often torchrun restarts the ranks after a failure; msrun does not restart them."""
    npus: NpuJob | None = None
    """What the job is like, if its ranks compute on Ascend NPUs."""

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables that the launcher is started with, unless they are set."""
        return npu.settings(self.npus) if self.npus else {}

    def meeting(self, host: str | None, port: int | None) -> tuple[str, int] | None:
        """Host and port where the launchers of all nodes meet; None where torchrun finds a free port by itself.

        Args:
            host: what the user wants, if anything.
            port: the same.
        """
        if self.launcher == "torchrun" and self.nodes == 1 and host is None and port is None:
            return None
        return host or "127.0.0.1", port or PORTS[self.launcher]

    def command(self, node: int, host: str | None = None, port: int | None = None) -> list[str]:
        """The command that starts the ranks of one node.

        Args:
            node: number of the node, counted from 0.
            host: address of node 0. Default: this machine's own.
            port: a free port of node 0. Default: the launcher's default port.
        """
        place = self.meeting(host, port)
        if place is None:
            return ["torchrun", "--standalone", *self._ranks()]
        return [self.launcher, *self._place(str(node), place[0], str(place[1])), *self._ranks()]

    def slurm_script(self, options: Mapping[str, str]) -> str:
        """An sbatch script that starts the launcher on each node.

        Args:
            options: additional options of sbatch, such as `{"time": "02:00:00"}`.

        Raises UserError for an option that sbatch would misread.
        """
        asked = {"job-name": "moeport", "nodes": str(self.nodes), "ntasks-per-node": "1", **options}
        given = npu.settings(self.npus, scheduled=True) if self.npus else {}
        launcher = [self.launcher, *self._place("$SLURM_NODEID", "$MASTER_ADDR", "$MASTER_PORT")]
        resumes = self.arguments[0] == "train" and "--resume" not in self.arguments
        start = [*(["--npus"] if self.npus else []), *launcher]
        return slurm_script(asked, self.ranks_per_node, start, self._ranks(), resumes, given)

    def _place(self, node: str, host: str, port: str) -> list[str]:
        if self.launcher == "torchrun":
            return [f"--node-rank={node}", f"--master-addr={host}", f"--master-port={port}"]
        logs = f"--log_dir=msrun_logs/node_{node}"
        return [f"--node_rank={node}", f"--master_addr={host}", f"--master_port={port}", logs]

    def _ranks(self) -> list[str]:
        if self.launcher == "torchrun":
            restarts = [f"--max-restarts={self.max_restarts}"] if self.max_restarts else []
            sizes = [f"--nnodes={self.nodes}", f"--nproc-per-node={self.ranks_per_node}", *restarts]
            return [*sizes, "-m", "moeport", *self.arguments]
        workers = [f"--worker_num={self.nodes * self.ranks_per_node}", f"--local_worker_num={self.ranks_per_node}"]
        bound = ["--bind_core=True"] if self.npus and self.ranks_per_node > 1 else []
        return [*workers, *bound, "--join=True", "python", "-m", "moeport", *self.arguments]


def run(command: Sequence[str], settings: Mapping[str, str] | None = None) -> int:
    """Runs the command of a node until it exits. A signal that asks for an end reaches the ranks, which save the run.

    What ranks have said last is said again, below the launcher's own report.

    Args:
        command: as `LaunchSpec.command` returns it.
        settings: environment variables of the launcher and its ranks; those that are set stay.

    Returns: the exit code, of the ranks if they have said why they ended; 130 after a signal.
    """
    with tempfile.TemporaryDirectory(prefix="moeport-") as folder:
        code = _run(command, Path(folder), settings or {})
        words = last_words.read(Path(folder)) if code not in (0, INTERRUPTED) else []
    for said in words[-SAID_AGAIN:]:
        sys.stderr.write(f"{said.text}\n")
    return words[-1].code if words else code


def _run(command: Sequence[str], folder: Path, settings: Mapping[str, str]) -> int:
    """Runs it; ranks leave their last words in the folder."""
    launcher, signals = command[0], list[int]()
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for process in started:
            _stop(process, launcher, again=len(signals) > 1)

    before = install(stop)
    try:
        with handled():
            started.append(_start(command, folder, settings))
            if signals:
                _stop(started[0], launcher, again=False)
            code = started[0].wait()
    finally:
        restore(before)
    return INTERRUPTED if signals else code


def _start(command: Sequence[str], folder: Path, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    launcher = command[0]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # msrun requires the word `python`
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:  # Slurm may send a signal to every process of a step, and launchers would die of these two
        return subprocess.Popen(
            [*_ends_with_this(launcher), MODULES[launcher], *command[1:]],
            env={**settings, **os.environ}
            | {"PATH": path, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS), last_words.FOLDER: str(folder)},
            start_new_session=True,  # or Ctrl-C would arrive twice: from the terminal and from here
        )
    finally:
        restore(before)


def _ends_with_this(launcher: str) -> list[str]:
    """Runs a module that ends its ranks when this process is killed; msrun does so at SIGINT alone."""
    return started_here(signal.SIGINT if launcher == "msrun" else signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes], launcher: str, again: bool) -> None:
    """Ask a launcher's ranks to save and end; the second time, end them."""
    if launcher == "torchrun":
        process.send_signal(signal.SIGTERM)  # torchrun passes it on, and waits until the ranks have saved
    elif again or not _signal_ranks(process.pid):
        process.send_signal(signal.SIGINT)  # msrun kills its ranks


def _signal_ranks(msrun: int) -> bool:
    """Ask the ranks that msrun has started to save and end. Returns whether there are any."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == msrun and b"MS_ROLE=MS_WORKER" in (status.parent / "environ").read_bytes().split(b"\0"):
                os.kill(int(status.parent.name), signal.SIGTERM)
                found.append(status)
    return bool(found)
