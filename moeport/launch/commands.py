"""The commands that start a training job: torchrun or msrun on each node, and a Slurm script around them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from moeport.stopping import INTERRUPTED, handled, install, restore

MODULES = {"torchrun": "torch.distributed.run", "msrun": "mindspore.parallel.cluster.run"}
PORTS = {"torchrun": 29500, "msrun": 8118}
"""Default rendezvous port of each launcher."""
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

    def command(self, node: int, host: str, port: int | None = None) -> list[str]:
        """The command that starts the ranks of one node.

        Args:
            node: number of the node, counted from 0.
            host: address of node 0.
            port: a free port of node 0. Default: the launcher's default port.
        """
        if self.launcher == "torchrun" and self.nodes == 1:
            return ["torchrun", "--standalone", *self._ranks()]
        return [self.launcher, *self._place(str(node), host, str(port or PORTS[self.launcher])), *self._ranks()]

    def slurm_script(self, options: Mapping[str, str]) -> str:
        """An sbatch script that starts the launcher on each node.

        Args:
            options: additional options of sbatch, such as `{"time": "02:00:00"}`.
        """
        asked = {"job-name": "moeport", "nodes": str(self.nodes), "ntasks-per-node": "1", **options}
        place = " ".join(self._place("$SLURM_NODEID", "$MASTER_ADDR", "$MASTER_PORT"))
        return SLURM_SCRIPT.format(
            options="\n".join(f"#SBATCH --{name}={value}" for name, value in asked.items()),
            ranks=self.ranks_per_node,
            start=shlex.quote(f'exec {self.launcher} {place} "$@"'),
            arguments=shlex.join(self._ranks()),
        )

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
        return [*workers, "--join=True", "python", "-m", "moeport", *self.arguments]


SLURM_SCRIPT = """\
#!/bin/bash
{options}
# Adapt this: options that your site requires, such as #SBATCH --account=NAME, memory, or --gres=npu:8 for NPUs.
# Each Slurm task is the launcher of a node, so its cores serve all {ranks} ranks of the node:
##SBATCH --cpus-per-task=CORES

# Adapt this: activate the Python environment that has moeport, for example with
# source .venv/bin/activate

set -eu
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" \\
    bash -c {start} bash \\
    {arguments}
"""


def run(command: Sequence[str]) -> int:
    """Runs the command of a node until it exits. A signal that asks for an end reaches the ranks, which save the run.

    Returns: the exit code; 130 after a signal.
    """
    launcher = command[0]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # msrun requires the word `python`
    process = subprocess.Popen(
        [sys.executable, "-m", MODULES[launcher], *command[1:]],
        env=os.environ | {"PATH": path, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS)},
        start_new_session=True,  # or Ctrl-C would arrive twice: from the terminal and from here
    )
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if launcher == "torchrun":
            process.send_signal(signal.SIGTERM)  # torchrun passes it on, and waits until the ranks have saved
        elif len(signals) > 1 or not _signal_ranks(process.pid):
            process.send_signal(signal.SIGINT)  # msrun kills its ranks

    before = install(stop)
    try:
        with handled():
            code = process.wait()
    finally:
        restore(before)
    return INTERRUPTED if signals else code


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
