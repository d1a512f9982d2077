"""Where the processes of a job find each other, before their framework communicates.

Frameworks wait for absent processes in C++, for minutes, and then name an address at best. Here every process says who
it is at the address that the launcher names, and learns who else has come. If somebody is missing, comes twice or
counts other ranks, every process gets one sentence.

Where that is: `moeport.comm.rendezvous`, and under torchrun `moeport.backends.torch.rendezvous`.
"""

from __future__ import annotations

import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from moeport.comm.agreement import name_ranks
from moeport.comm.wire import Message
from moeport.errors import MeetingError
from moeport.launch.launcher import Launch


@dataclass(frozen=True)
class Record:
    """What a process says about itself."""

    rank: int
    size: int
    host: str
    pid: int
    nodes: list[int] | None = None
    """Node number of each rank, if its launcher gives it."""
    address: str = ""
    """Address at which it has reached the meeting."""

    @classmethod
    def of(cls, message: Message) -> Record:
        """From JSON; TypeError, KeyError or ValueError for anything else."""
        numbers = {name: int(message[name]) for name in ("rank", "size", "pid")}
        nodes = message["nodes"]
        return cls(**numbers, host=str(message["host"]), nodes=nodes, address=str(message["address"]))

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


class Meeting(ABC):
    """The meeting of one job, as one of its ranks sees it.

    Args:
        launch: this process.
        timeout_s: longest time to wait for the others.
    """

    def __init__(self, launch: Launch, timeout_s: float):
        self.launch, self.timeout_s = launch, timeout_s
        self.deadline = time.monotonic() + timeout_s

    def own(self) -> Record:
        """What this process says about itself."""
        nodes = self.launch.nodes
        return Record(
            self.launch.rank, self.launch.size, socket.gethostname(), os.getpid(), list(nodes) if nodes else None
        )

    @abstractmethod
    def gather(self) -> list[Record]:
        """Everybody's record, by rank. Raises MeetingError if that cannot be."""

    @abstractmethod
    def share(self, message: Message | None) -> Message:
        """Rank 0's message, which it passes here; called after `gather` by every rank."""

    @abstractmethod
    def free(self) -> None:
        """Free the address for the framework, on every rank; to be followed by a barrier."""

    @abstractmethod
    def leave(self) -> None:
        """End without starting the framework."""

    def check_sizes(self, records: Sequence[Record]) -> None:
        """Raises MeetingError if they do not count the same ranks."""
        if text := sizes_differ(self.launch, records):
            raise MeetingError(text)

    def absent(self, records: Sequence[Record]) -> str:
        """That some have not come, in a sentence."""
        return somebody_absent(self.launch, records, self.timeout_s)


def sizes_differ(launch: Launch, records: Sequence[Record]) -> str | None:
    """That ranks count different numbers of ranks, in a sentence."""
    if len({record.size for record in records}) <= 1:
        return None
    sizes = ", ".join(f"{record.size} on rank {record.rank} ({record})" for record in records)
    return (
        f"the ranks disagree on {launch.variables.size}, their number: {sizes}; start every rank of the job with the "
        "same number"
    )


def somebody_absent(launch: Launch, records: Sequence[Record], timeout_s: float, claims: Sequence[str] = ()) -> str:
    """That ranks have not come, with those that have."""
    there = sorted(record.rank for record in records)
    missing = [rank for rank in range(launch.size) if rank not in there]
    hosts = ", ".join(dict.fromkeys(record.host for record in records))
    came = f"{name_ranks(there)} came, from {hosts}" if there else "nobody came"
    twice = "".join(f"; {claim}" for claim in claims)
    have = "has" if len(missing) == 1 else "have"
    return (
        f"{name_ranks(missing)} of {launch.size} {have} not come to {launch.place} within {timeout_s:g} s "
        f"(comm.timeout); {came}{twice}; start the missing ranks, and let their hosts reach {launch.place}"
    )
