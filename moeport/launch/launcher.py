"""What the environment set by torchrun, msrun, mpirun or srun says about this process."""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moeport.errors import UserError
from moeport.facts import default_backend
from moeport.launch.slurm import expand_hosts, tasks_per_node


@dataclass(frozen=True)
class Variables:
    """The environment variables in which a launcher says what a user may want to correct."""

    rank: str
    size: str
    host: str = "MASTER_ADDR"
    port: str = "MASTER_PORT"


VARIABLES = {
    "torchrun": Variables("RANK", "WORLD_SIZE"),
    "msrun": Variables("MS_NODE_ID", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT"),
    "openmpi": Variables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}


@dataclass(frozen=True)
class Launch:
    """One process of a job, as described by its launcher."""

    launcher: Literal["torchrun", "msrun", "openmpi", "slurm"]
    rank: int
    """0 to size - 1; -1 in msrun's scheduler."""
    size: int
    local_rank: int
    """Rank within this node; -1 in msrun's scheduler."""
    host: str
    """Host where rank 0 or the launcher's rendezvous listens."""
    port: int
    local_size: int | None = None
    """Number of processes on this node; unknown under msrun."""
    nodes: tuple[int, ...] | None = None
    """Node number of each rank, if the launcher provides it."""

    def on_nodes_of(self, ranks: int) -> Launch:
        """The same process, where each `ranks` consecutive ranks count as a node. `ranks` must divide the size."""
        return replace(self, nodes=tuple(rank // ranks for rank in range(self.size)))

    @property
    def is_scheduler(self) -> bool:
        """Whether this is msrun's scheduler, which runs the workers' command without a rank."""
        return self.rank < 0

    @property
    def variables(self) -> Variables:
        """Where it comes from."""
        return VARIABLES[self.launcher]

    @property
    def place(self) -> str:
        """Host and port where the ranks meet."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def host_role(self) -> str:
        """Who listens there."""
        return "msrun's scheduler" if self.launcher == "msrun" else "rank 0"

    @property
    def backend(self) -> str:
        """The backend whose communication works under this launcher."""
        return default_backend(self.launcher)


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process was launched; None for a process that was started on its own.

    torchrun and msrun are checked first, since Slurm or Open MPI may have started them. A single process under Slurm or
    Open MPI counts as started on its own.

    Raises UserError if variables are missing or not numbers, or if Slurm or Open MPI started different numbers of
    processes on different nodes.
    """
    if "RANK" in environment or "LOCAL_RANK" in environment:
        return _torchrun(environment)
    if "MS_ROLE" in environment:
        return _msrun(environment)
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _openmpi(environment)
    if "SLURM_STEP_ID" in environment:
        return _slurm(environment)
    return None


def _torchrun(environment: Mapping[str, str]) -> Launch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    _require(environment, names, "torchrun")
    rank, size = _place(environment, "RANK", "WORLD_SIZE")
    local_rank, local_size = _place(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    node = _number(environment, "GROUP_RANK") if "GROUP_RANK" in environment else -1
    alike = size % local_size == 0 and rank == node * local_size + local_rank
    return Launch(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        nodes=tuple(other // local_size for other in range(size)) if alike else None,
        host=_host(environment, "MASTER_ADDR"),
        port=_port_number(environment, "MASTER_PORT"),
    )


def _msrun(environment: Mapping[str, str]) -> Launch:
    _require(environment, ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT"), "msrun")
    role = environment["MS_ROLE"]
    if role not in ("MS_WORKER", "MS_SCHED"):
        raise UserError(f"environment variable MS_ROLE: expected MS_WORKER or MS_SCHED (got {role!r}); use msrun")
    worker = role == "MS_WORKER"
    if worker:
        # Workers without a rank inherit the scheduler's RANK_ID from msrun; MS_NODE_ID is set only along with a rank.
        if "MS_NODE_ID" not in environment:
            raise UserError("msrun gave this process no rank: MS_NODE_ID is not set; use --node_rank")
        _require(environment, ("DEVICE_ID",), "msrun")
    size = _number(environment, "MS_WORKER_NUM", 1)
    return Launch(
        launcher="msrun",
        rank=_place(environment, "MS_NODE_ID", "MS_WORKER_NUM")[0] if worker else -1,
        size=size,
        local_rank=_number(environment, "DEVICE_ID", 0) if worker else -1,
        host=_host(environment, "MS_SCHED_HOST"),
        port=_port_number(environment, "MS_SCHED_PORT"),
    )


def _openmpi(environment: Mapping[str, str]) -> Launch | None:
    names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    _require(environment, names, "mpirun")
    if _number(environment, names[1], 1) == 1:
        return None
    rank, size = _place(environment, names[0], names[1])
    local_rank, local_size = _place(environment, names[2], names[3])
    if size % local_size:
        raise UserError(
            f"mpirun started {local_size} of {size} processes on this node; expected the same number on each node: "
            "use --map-by ppr:N:node"
        )
    if "MASTER_ADDR" not in environment and local_size < size:
        raise UserError(
            f"mpirun started {size} processes, {local_size} of them on this node, and does not say where rank 0 is; "
            "pass the name of its host: mpirun -x MASTER_ADDR=HOST"
        )
    return Launch(
        launcher="openmpi",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        host=environment.get("MASTER_ADDR", "localhost"),
        port=_port(environment, "PMIX_NAMESPACE"),
    )


def _slurm(environment: Mapping[str, str]) -> Launch | None:
    size, counts, hosts = (
        step if step in environment else job
        for step, job in (
            ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
            ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
            ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        )
    )
    if environment.get(size, "1") == "1":  # salloc's shell is a step too
        return None
    _require(environment, ("SLURM_PROCID", "SLURM_LOCALID", size, counts, hosts), "srun")
    rank, ranks = _place(environment, "SLURM_PROCID", size)
    per_node = tasks_per_node(environment[counts])
    named = expand_hosts(environment[hosts])
    if not per_node or not named:
        raise UserError(
            f"environment variables {counts} and {hosts}: expected tasks per node such as 4(x2) and host names such as "
            f"gpu[01-02] (got {environment[counts]!r} and {environment[hosts]!r})"
        )
    if len(set(per_node)) > 1:
        raise UserError(
            f"srun started {environment[counts]} tasks on the nodes; expected the same number on each: "
            "use --ntasks-per-node=N"
        )
    return Launch(
        launcher="slurm",
        rank=rank,
        size=ranks,
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        local_size=per_node[0],
        host=environment.get("MASTER_ADDR") or named[0],
        port=_port(environment, "SLURM_JOB_ID", "SLURM_STEP_ID"),
    )


def _port(environment: Mapping[str, str], *job: str) -> int:
    """MASTER_PORT, or a port between 15000 and 24999 derived from the variables that identify the job."""
    if "MASTER_PORT" in environment:
        return _port_number(environment, "MASTER_PORT")
    return 15000 + zlib.crc32(".".join(environment.get(name, "") for name in job).encode()) % 10000


@dataclass(frozen=True)
class NodeProcess:
    """A process to start on a node."""

    node: int
    command: list[str]
    environment: dict[str, str]
    """Variables added to the environment of the starting process."""


def node_processes(
    launcher: Literal["torchrun", "msrun"],
    nodes: int,
    ranks_per_node: int,
    host: str,
    command: Sequence[str],
    port: int = 29500,
) -> list[NodeProcess]:
    """The processes that run a moeport command on all nodes: for torch every rank, in the environment that torchrun
    would set; for MindSpore one msrun per node.

    Args:
        launcher: selects the framework.
        nodes: number of nodes.
        ranks_per_node: ranks on each node.
        host: address of node 0.
        command: arguments of `moeport`.
        port: a free port of node 0.
    """
    size = nodes * ranks_per_node
    program = [sys.executable, "-m", "moeport", *command]
    if launcher == "torchrun":
        return [
            NodeProcess(
                rank // ranks_per_node,
                program,
                {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(rank % ranks_per_node),
                    "LOCAL_WORLD_SIZE": str(ranks_per_node),
                    "GROUP_RANK": str(rank // ranks_per_node),
                    "MASTER_ADDR": host,
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(size)
        ]
    msrun = [sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={size}", "--join=True"]
    msrun += [f"--local_worker_num={ranks_per_node}", f"--master_addr={host}", f"--master_port={port}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # msrun requires the word `python`
    return [
        NodeProcess(
            node,
            [*msrun, f"--node_rank={node}", f"--log_dir=msrun_logs/node_{node}", "python", *program[1:]],
            {"PATH": path},
        )
        for node in range(nodes)
    ]


def _require(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        found = [name for name in names if name in environment]
        raise UserError(
            f"the environment is that of a process of {launcher} in part: {', '.join(found)} is set, "
            f"{', '.join(missing)} is not; start with {launcher}, or unset what is set"
        )


def _number(environment: Mapping[str, str], name: str, least: int | None = None, most: int | None = None) -> int:
    text = environment[name]
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()):
        raise UserError(f"environment variable {name}: expected an integer (got {text!r})")
    number = int(text)
    if (least is not None and number < least) or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"environment variable {name}: expected {wanted} (got {number})")
    return number


def _place(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    """A rank and how many there are, by the names of their variables."""
    ranks = _number(environment, size, 1)
    found = _number(environment, rank)
    if not 0 <= found < ranks:
        raise UserError(
            f"environment variable {rank}: expected 0 to {ranks - 1}, since {size} is {ranks} (got {found})"
        )
    return found, ranks


def _port_number(environment: Mapping[str, str], name: str) -> int:
    return _number(environment, name, 1, 65535)


def _host(environment: Mapping[str, str], name: str) -> str:
    if not environment[name].strip():
        raise UserError(f"environment variable {name}: expected a host name or address (got {environment[name]!r})")
    return environment[name].strip()
