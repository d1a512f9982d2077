"""Where the ranks of torch meet: in torchrun's own store, whose address nobody else can listen at."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from typing_extensions import override

from moeport.comm.meeting import Meeting, Record
from moeport.comm.places import NAME_SECONDS, plain, reached, resolved
from moeport.comm.rendezvous import meeting_of as meeting_at
from moeport.comm.wire import Message
from moeport.errors import MeetingError
from moeport.launch.launcher import Launch

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Environment variable: torchrun's own store is at MASTER_ADDR and MASTER_PORT."""
POLL_SECONDS = 0.05


def meeting_of(launch: Launch, timeout_s: float) -> Meeting:
    """Where the ranks of a job meet: in torchrun's store if there is one, otherwise at the launcher's address."""
    return StoreMeeting(launch, timeout_s) if has_agent_store() else meeting_at(launch, timeout_s)


def has_agent_store() -> bool:
    """Whether torchrun has made a store for its ranks."""
    return os.environ.get(AGENT_STORE) == "True"


def store(launch: Launch, timeout_s: float) -> dist.Store:
    """The store through which processes find each other: torchrun's own, otherwise one in the first process.

    When torchrun restarts the processes it keeps its store, with the addresses of those that died, so each start uses
    its own keys.
    """
    found = dist.TCPStore(
        launch.host,
        launch.port,
        launch.size,
        is_master=launch.rank == 0 and not has_agent_store(),
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"moeport/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)


class StoreMeeting(Meeting):
    """Each rank leaves its record in the store and reads those of the others."""

    def __init__(self, launch: Launch, timeout_s: float):
        super().__init__(launch, timeout_s)
        try:
            addresses = resolved(launch, time.monotonic() + min(timeout_s, NAME_SECONDS))
            with reached(addresses, self.deadline) as connection:
                self._address = plain(connection.getpeername()[0])
            self._store: Any = store(launch, timeout_s)
        except (OSError, RuntimeError) as error:
            raise MeetingError(
                f"rank {launch.rank} of {launch.size} cannot reach torchrun's store at {launch.place}: {_line(error)}; "
                "let this host reach the host of torchrun's first node there"
            ) from error

    @override
    def gather(self) -> list[Record]:
        own = replace(self.own(), address=self._address)
        self._set(f"meeting/{own.rank}", asdict(own))
        records: list[Record] = []
        for rank in range(self.launch.size):
            found = self._get(f"meeting/{rank}")
            if found is None:
                there = [r for r in range(self.launch.size) if self._store.check([f"meeting/{r}"])]
                raise MeetingError(self.absent([Record.of(json.loads(self._store.get(f"meeting/{r}"))) for r in there]))
            records.append(Record.of(found))
            self.check_sizes([own, *records])
        return records

    @override
    def share(self, message: Message | None) -> Message:
        if message is not None:
            self._set("meeting/shared", message)
            return message
        found = self._get("meeting/shared")
        if found is None:
            raise MeetingError(f"rank 0 has not said within {self.timeout_s:g} s where it listens; see its output")
        return found

    @override
    def free(self) -> None:
        """Nothing: torch uses the same store."""

    @override
    def leave(self) -> None:
        """Nothing: the store is torchrun's."""

    def _set(self, key: str, value: Message) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Message | None:
        """None if it has not come by the deadline."""
        while not self._store.check([key]):
            if time.monotonic() > self.deadline:
                return None
            time.sleep(POLL_SECONDS)
        found: Message = json.loads(self._store.get(key))
        return found


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
