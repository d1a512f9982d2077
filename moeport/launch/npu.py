"""What a job on Ascend NPUs needs besides its ranks: environment variables of HCCL and of the framework.

A table of rules, after the documentation of CANN 8.5 and of torch-npu; not run on Ascend hardware. A variable that is
set in the environment stays as it is.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeport.ascend.installed import npus
from moeport.ascend.table import VARIABLES
from moeport.errors import UserError
from moeport.launch.network import interface_towards

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
INTERFACES = ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME")
"""Variables that say where HCCL's ranks meet, the stronger first."""
CONNECT_SECONDS = (120, 7200)
"""The least and the most that HCCL_CONNECT_TIMEOUT may be."""
MIB = 2**20


@dataclass(frozen=True)
class NpuJob:
    """A job on NPUs."""

    launcher: str
    ranks_per_node: int
    timeout_s: float
    """The config's comm.timeout: the longest that ranks may wait for each other."""
    message_bytes: int
    """Hidden states of one micro-batch of a rank."""


@dataclass(frozen=True)
class Setting:
    """A variable of the job."""

    why: str
    value: Callable[[NpuJob], int | str | None]
    """Its value; None: the default is right."""
    launchers: tuple[str, ...] = ("torchrun", "msrun")
    scheduled: bool = True
    """Whether a script for Slurm sets it too."""


def _execution(job: NpuJob) -> int | None:
    usual = int(VARIABLES["HCCL_EXEC_TIMEOUT"].default)
    return math.ceil(job.timeout_s) if job.timeout_s > usual else None


def _event(job: NpuJob) -> int | None:
    execution = _execution(job)
    return execution + 32 if execution else None


SETTINGS: Mapping[str, Setting] = {
    VISIBLE: Setting(
        "one NPU for each rank of a node; under Slurm, `--gres` chooses them",
        lambda job: ",".join(map(str, range(job.ranks_per_node))),
        scheduled=False,
    ),
    "CPU_AFFINITY_CONF": Setting(
        "each rank keeps to its share of the cores; under msrun, `--bind_core=True` does that",
        lambda job: 1 if job.ranks_per_node > 1 else None,
        ("torchrun",),
    ),
    "HCCL_CONNECT_TIMEOUT": Setting(
        "`comm.timeout`, within the 120 to 7200 s that HCCL takes",
        lambda job: min(max(math.ceil(job.timeout_s), CONNECT_SECONDS[0]), CONNECT_SECONDS[1]),
    ),
    "HCCL_EXEC_TIMEOUT": Setting("`comm.timeout`, where that is longer than HCCL's own 1836 s", _execution),
    "HCCL_EVENT_TIMEOUT": Setting("32 s more than that, so that HCCL's own message comes first", _event, ("torchrun",)),
    "HCCL_BUFFSIZE": Setting(
        "megabytes of a rank's hidden states, at least HCCL's own 200; each group of ranks takes twice that of memory",
        lambda job: max(math.ceil(job.message_bytes / MIB), int(VARIABLES["HCCL_BUFFSIZE"].default)),
    ),
}
"""Variables by name, in the order in which they are printed."""


def settings(job: NpuJob, scheduled: bool = False) -> dict[str, str]:
    """The variables of a job.

    Args:
        job: the job.
        scheduled: for a script of a scheduler, which gives out the NPUs itself.
    """
    rows = {
        name: row
        for name, row in SETTINGS.items()
        if job.launcher in row.launchers and (row.scheduled or not scheduled)
    }
    values = {name: row.value(job) for name, row in rows.items()}
    return {name: str(value) for name, value in values.items() if value is not None}


def on_node(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The network interface of this node at which the ranks of the job meet.

    Args:
        command: of a launcher; it names the first node.
        environment: variables of this process; where one names the interface, that stays.

    Returns: the variable for HCCL; nothing where it is not known, or where the job has a single node.
    """
    text = " ".join(command)
    host = re.search(r"--master[-_]addr=(\S+)", text)
    nodes, ranks, own = (re.search(rf"--{name}=(\d+)", text) for name in ("nnodes", "worker_num", "local_worker_num"))
    several = int(nodes[1]) > 1 if nodes else bool(ranks and own and int(ranks[1]) > int(own[1]))
    if host is None or not several or any(environment.get(name) for name in INTERFACES):
        return {}
    name = interface_towards(host[1])
    return {"HCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def check_visible(ranks: int, environment: Mapping[str, str] = os.environ, seen: int | None = None) -> None:
    """Raises UserError if a node has fewer NPUs than ranks.

    Args:
        ranks: of this node.
        environment: variables of this process.
        seen: number of NPUs that the system lists; None: look. A system that lists none, as in some containers, is
            believed to have enough.
    """
    chosen = environment.get(VISIBLE)
    if chosen and re.fullmatch(VARIABLES[VISIBLE].pattern, chosen) and len(chosen.split(",")) < ranks:
        raise UserError(
            f"--ranks-per-node {ranks}: {VISIBLE} names {len(chosen.split(','))} NPUs ({chosen}); expected {ranks}, "
            "since each rank has its own; unset the variable, or start fewer ranks"
        )
    seen = len(npus()) if seen is None else seen
    if 0 < seen < ranks:
        raise UserError(
            f"--ranks-per-node {ranks}: this machine has {seen} NPUs, and each rank needs its own; start at most {seen}"
        )
