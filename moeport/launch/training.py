"""What `moeport launch` does: the commands that train a config on several ranks, printed, run, or written for Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.ascend.trouble import refuse_broken
from moeport.errors import UserError
from moeport.facts import BACKENDS
from moeport.files import write_text
from moeport.launch import commands
from moeport.launch.commands import LaunchSpec
from moeport.launch.npu import NpuJob, check_visible, on_node
from moeport.launch.place import check_place


@dataclass(frozen=True)
class Nodes:
    """Where the ranks run."""

    ranks_per_node: int
    nodes: int = 1
    node_rank: int | None = None
    """The one node, from 0, whose command is wanted; None: all."""
    master_addr: str | None = None
    """Host name or address of node 0."""
    master_port: int | None = None
    """A free port of node 0; None: the launcher's own."""
    max_restarts: int = 0
    """How often torchrun starts the ranks again after a failure."""

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.ranks_per_node

    def check(self, backend: str, checkpoint_interval: int) -> None:
        """Raises UserError for restarts that cannot be."""
        if self.max_restarts and BACKENDS[backend].launcher == "msrun":
            raise UserError(
                f"--max-restarts {self.max_restarts}: msrun, which starts {backend}, does not restart; leave it out, "
                "and start the job again with --resume after a failure"
            )
        if self.max_restarts and not checkpoint_interval:
            raise UserError(
                f"--max-restarts {self.max_restarts}: checkpoint.interval is 0, so there is no checkpoint to go on "
                "from; set it, as in --set checkpoint.interval=100"
            )

    def check_addresses(self, run: bool, slurm: bool) -> None:
        """Raises UserError for a node that is not there, or that is not known."""
        last = self.nodes - 1
        if self.node_rank is not None and self.node_rank > last:
            raise UserError(f"--node-rank {self.node_rank}: expected 0 to {last}, since --nodes is {self.nodes}")
        if run and self.nodes > 1 and self.node_rank is None:
            raise UserError(f"--node-rank is missing: --run starts one of the {self.nodes} nodes; expected 0 to {last}")
        if self.nodes > 1 and not self.master_addr and not slurm:
            raise UserError(
                f"--master-addr is missing: {self.nodes} nodes meet at node 0; expected its host name or address"
            )


@dataclass(frozen=True)
class NpuNeeds:
    """What the config says of a job on NPUs."""

    timeout_s: float
    """The longest that ranks may wait for each other."""
    message_bytes: int
    """Hidden states of one micro-batch of a rank."""


@dataclass(frozen=True)
class Script:
    """An sbatch script that is wanted instead of commands."""

    slurm: Path | None = None
    """File to write; None: no script."""
    gpus_per_node: int | None = None
    """GPUs or NPUs; None: not asked for, or as many NPUs as ranks."""
    time: str | None = None
    partition: str | None = None
    cpus_per_rank: int | None = None

    def write(self, job: LaunchSpec) -> Path:
        """Write the script of a job. Raises UserError where the file cannot be made or is there already."""
        assert self.slurm is not None
        devices: dict[str, Any] = {"gpus-per-node": self.gpus_per_node}
        if job.npus:
            devices = {"gres": f"npu:{self.gpus_per_node or job.ranks_per_node}"}
        asked = {**devices, "time": self.time, "partition": self.partition}
        asked["cpus-per-task"] = self.cpus_per_rank and self.cpus_per_rank * job.ranks_per_node
        text = job.slurm_script({key: str(value) for key, value in asked.items() if value is not None})
        if self.slurm.is_file():
            raise UserError(f"--slurm {self.slurm}: already exists; name a new file, or delete it")
        write_text(self.slurm, text)
        return self.slurm


@dataclass(frozen=True)
class TrainingJob:
    """A training job, as the user asked for it."""

    file: Path
    """The config."""
    nodes: Nodes
    overrides: Sequence[str] = ()
    resume: bool = False
    run: bool = False
    """Start it here instead of printing it."""
    script: Script = Script()

    def launch(
        self, backend: str, checkpoint_interval: int, say: Callable[[str], None], npus: NpuNeeds | None = None
    ) -> int:
        """Check it, then say the commands, or run one, or write the script.

        Args:
            backend: the config's, by name; one that trains.
            checkpoint_interval: the config's; 0: no checkpoints.
            say: takes each line of output.
            npus: what it needs on NPUs, if it computes on those.

        Returns: the exit code.

        Raises UserError for what cannot be started.
        """
        self._check(backend, checkpoint_interval)
        job = self._job(backend, npus)
        if self.script.slurm:
            path = self.script.write(job)
            say(f"wrote {path}; adapt it, then: sbatch {shlex.quote(str(path))}")
            return 0
        return self._commands(job, backend, say)

    def _check(self, backend: str, checkpoint_interval: int) -> None:
        self.nodes.check(backend, checkpoint_interval)
        for word in (str(self.file), *self.overrides, self.nodes.master_addr or ""):
            if not word.isprintable():
                raise UserError(f"{word!r} contains control characters, which no command line can show; leave them out")
        if self.script.slurm and self.run:
            raise UserError("--slurm writes a script and --run starts the job here; use one of them")
        self.nodes.check_addresses(self.run, self.script.slurm is not None)

    def _job(self, backend: str, npus: NpuNeeds | None) -> LaunchSpec:
        train = ["train", str(self.file)]
        for override in self.overrides:
            train += ["--set", override]
        if self.resume or self.nodes.max_restarts:
            train.append("--resume")
        nodes = self.nodes
        launcher = BACKENDS[backend].launcher or "torchrun"
        on = NpuJob(launcher, nodes.ranks_per_node, npus.timeout_s, npus.message_bytes) if npus else None
        return LaunchSpec(launcher, nodes.nodes, nodes.ranks_per_node, tuple(train), nodes.max_restarts, on)

    def _commands(self, job: LaunchSpec, backend: str, say: Callable[[str], None]) -> int:
        nodes = self.nodes
        for node in range(nodes.nodes) if nodes.node_rank is None else [nodes.node_rank]:
            command = job.command(node, nodes.master_addr, nodes.master_port)
            if self.run:
                refuse_broken(BACKENDS[backend].extensions)
                if job.npus:
                    check_visible(nodes.ranks_per_node)
                if place := job.meeting(nodes.master_addr, nodes.master_port):
                    check_place(job.launcher, *place, is_first=node == 0)
                return commands.run(command, job.settings | (on_node(command) if job.npus else {}))
            if nodes.nodes > 1:
                say(f"# node {node}")
            say(shlex.join([*(f"{name}={value}" for name, value in job.settings.items()), *command]))
        return 0
