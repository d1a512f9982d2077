"""The meeting at the address that the launcher names.

There listens rank 0 or, under msrun, MindSpore's scheduler, which frees the port for MindSpore once the ranks have met.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import asdict

from typing_extensions import override

from moeport.comm.meeting import Meeting, Record, sizes_differ, somebody_absent
from moeport.comm.places import GREETING, NAME_SECONDS, bound, greets, plain, reached, resolved
from moeport.comm.wire import Message, Peer, Reception, encoded
from moeport.errors import MeetingError
from moeport.launch.addresses import pauses
from moeport.launch.launcher import Launch

PURPOSE = b"moeport/meet/1 "
STRANGE_SECONDS = 30.0
"""Time after which a process no longer hopes that the right program will answer instead of a wrong one."""
STRANGER = "what answers there is not a moeport process that waits for ranks"
PARTING_SECONDS = 5.0
LATE_SECONDS = 20.0
"""Time for which those who come later are still told what is wrong."""


class Host(Meeting):
    """The meeting as the process sees it at whose address it is: rank 0 or, under msrun, the scheduler.

    Raises MeetingError if it cannot listen there.
    """

    def __init__(self, launch: Launch, timeout_s: float):
        super().__init__(launch, timeout_s)
        self.peers: dict[int, Peer] = {}
        self._records: dict[int, Record] = {}
        self._claims: list[str] = []
        self._wrong: str | None = None
        self._listeners = bound(launch)
        self._reception = Reception(self._listeners, PURPOSE, greeting=GREETING)

    @override
    def gather(self) -> list[Record]:
        if not self.launch.is_scheduler:
            self._records[self.launch.rank] = self.own()
        self._reception.receive(self._admit, self._wants, self.deadline)
        records = [self._records[rank] for rank in sorted(self._records)]
        if not self._wrong and self._wants():
            self._wrong = somebody_absent(self.launch, records, self.timeout_s, self._claims)
        if self._wrong:
            self._refuse_all(self._wrong)
            raise MeetingError(self._wrong)
        self._tell({"kind": "all", "records": [asdict(record) for record in records]})
        return records

    @override
    def share(self, message: Message | None) -> Message:
        assert message is not None
        self._tell({"kind": "shared", **message})
        self.leave()
        return message

    @override
    def free(self) -> None:
        """Nothing: the port is free since the ranks have met."""

    @override
    def leave(self) -> None:
        """The others close their connections first, so that the port is free at once."""
        self.close_listeners()
        deadline = time.monotonic() + PARTING_SECONDS
        for peer in self.peers.values():
            peer.wait_closed(deadline)
            peer.connection.close()
        self.peers.clear()

    def close_listeners(self) -> None:
        """Free the port."""
        for listener in self._listeners:
            listener.close()

    def refuse(self, fault: str) -> None:
        """Tell those who come that this rank does not start."""
        own = self.own()
        self._records[own.rank] = own
        self._refuse_all(_does_not_start(own, fault) or fault)

    def _wants(self) -> bool:
        return not self._wrong and len(self._records) < self.launch.size

    def _admit(self, peer: Peer, message: Message) -> None:
        record = Record.of(message | {"address": plain(peer.connection.getsockname()[0])})
        self._wrong = (
            sizes_differ(self.launch, [*self._records.values(), record])
            or self._not_counted(record)
            or _does_not_start(record, message.get("fault"))
        )
        if self._wrong:
            self._part(peer, self._wrong)
            self._records.setdefault(record.rank, record)
            return
        known = self._records.get(record.rank)
        if known and (record.rank not in self.peers or not _is_closed(self.peers[record.rank])):
            claim = f"{record} too says that it is rank {record.rank}, as {known} does"
            self._claims.append(claim)
            self._part(peer, f"{claim}; give every process another {self.launch.variables.rank}")
            return
        self.peers[record.rank], self._records[record.rank] = peer, record
        self._tell({"kind": "waiting", "ranks": sorted(self._records), "hosts": [r.host for r in self._all()]})

    def _not_counted(self, record: Record) -> str | None:
        if record.size == self.launch.size:
            return None
        size = self.launch.variables.size
        return (
            f"the ranks disagree on {size}, their number: {record.size} on rank {record.rank} ({record}), "
            f"{self.launch.size} at {self.launch.place}; start every rank of the job with the same number"
        )

    def _refuse_all(self, why: str) -> None:
        """Say it to those who are here, and for a while to those who come later."""
        self._tell({"kind": "stop", "text": why})
        told = {self.launch.rank, *self._records}

        def refuse(peer: Peer, message: Message) -> None:
            told.add(Record.of(message).rank)
            self._part(peer, why)

        until = min(self.deadline, time.monotonic() + LATE_SECONDS)
        self._reception.receive(refuse, lambda: len(told - {-1}) < self.launch.size, until)
        self.leave()

    def _part(self, peer: Peer, why: str) -> None:
        peer.send({"kind": "stop", "text": why})
        peer.finish(time.monotonic() + 0.2)
        peer.connection.close()

    def _all(self) -> list[Record]:
        return [self._records[rank] for rank in sorted(self._records)]

    def _tell(self, message: Message) -> None:
        for peer in self.peers.values():
            peer.send(message)


def serve(launch: Launch, timeout_s: float) -> bool:
    """What msrun's scheduler does until the ranks start MindSpore.

    Returns: whether they do. Otherwise they have ended, or somebody was missing and they have been told.
    """
    host = Host(launch, timeout_s)
    try:
        host.gather()
    except MeetingError:
        return False
    first, starts = host.peers[0], False
    with suppress(OSError, ValueError):
        shared = first.next()
        for rank, peer in host.peers.items():
            if rank:
                peer.send(shared)
        starts = first.next()["kind"] == "start"
    host.close_listeners()
    first.send({"kind": "closed"})
    host.leave()
    return starts


class Guest(Meeting):
    """The meeting as every other rank sees it."""

    def __init__(self, launch: Launch, timeout_s: float):
        super().__init__(launch, timeout_s)
        self._there: list[int] = []
        self._hosts: list[str] = []
        self._peer = Peer(self._connected())

    @override
    def gather(self) -> list[Record]:
        self._peer.connection.sendall(PURPOSE + encoded(asdict(self.own())))
        while True:
            message = self._next()
            if message["kind"] == "all":
                return [Record.of(record) for record in message["records"]]
            self._there, self._hosts = message["ranks"], message["hosts"]

    def excuse(self, fault: str) -> None:
        """Tell the others that this rank does not start."""
        self._peer.connection.sendall(PURPOSE + encoded(asdict(self.own()) | {"fault": fault}))
        self._peer.next(self.deadline)
        self.leave()

    @override
    def share(self, message: Message | None) -> Message:
        if message is not None:
            self._peer.send({"kind": "shared", **message})
            return message
        found = self._next()
        self.leave()
        return found

    @override
    def leave(self) -> None:
        self._peer.connection.close()

    @override
    def free(self) -> None:
        if self.launch.rank == 0:
            self._peer.send({"kind": "start"})
            with suppress(OSError, ValueError):
                self._peer.next(time.monotonic() + PARTING_SECONDS)
        self.leave()

    def _next(self) -> Message:
        try:
            message = self._peer.next(self.deadline + PARTING_SECONDS)  # the host's own deadline comes first
        except (OSError, ValueError) as error:
            who = f"{self.launch.host_role} at {self.launch.place}"
            if isinstance(error, TimeoutError):
                records = [Record(r, self.launch.size, h, 0) for r, h in zip(self._there, self._hosts, strict=True)]
                raise MeetingError(self.absent(records)) from error
            raise MeetingError(f"{who} ended before all {self.launch.size} ranks had met; see its output") from error
        if message["kind"] == "stop":
            raise MeetingError(str(message["text"]))
        return message

    def _connected(self) -> socket.socket:
        """A connection to a listener that greets as moeport's does."""
        started, problem, remedy = time.monotonic(), "nothing listens there", "start it there"
        strange_since: float | None = None
        for pause in pauses():
            addresses = resolved(self.launch, min(self.deadline, started + NAME_SECONDS))
            try:
                connection = reached(addresses, self.deadline)
                if greets(connection, self.deadline):
                    return connection
                connection.close()
                strange_since = strange_since or time.monotonic()
                problem, remedy = STRANGER, "let every rank use a free port"
            except OSError as error:
                problem, remedy, strange_since = error.strerror or str(error), "start it there", None
            now = time.monotonic()
            if now > self.deadline or (strange_since and now - strange_since > STRANGE_SECONDS):
                break
            time.sleep(min(pause, max(self.deadline - now, 0.01)))
        variables = self.launch.variables
        raise MeetingError(
            f"rank {self.launch.rank} of {self.launch.size} has not found {self.launch.host_role} at "
            f"{self.launch.place} within {time.monotonic() - started:.3g} s ({problem}); {remedy}, or "
            f"correct {variables.host} and {variables.port}"
        )


def meeting_of(launch: Launch, timeout_s: float) -> Meeting:
    """The meeting of a rank. Raises MeetingError."""
    return Host(launch, timeout_s) if _hosts(launch) else Guest(launch, timeout_s)


def excuse(launch: Launch, fault: str) -> None:
    """Tell the other ranks, if they come within some seconds, why this one does not start."""
    with suppress(MeetingError, OSError, ValueError):
        if _hosts(launch):
            Host(launch, LATE_SECONDS).refuse(fault)
        else:
            Guest(launch, LATE_SECONDS).excuse(fault)


def _hosts(launch: Launch) -> bool:
    return launch.rank == 0 and launch.launcher != "msrun"


def _does_not_start(record: Record, fault: str | None) -> str | None:
    return fault and f"rank {record.rank} of {record.size} ({record}) does not start: {fault}"


def _is_closed(peer: Peer) -> bool:
    with suppress(BlockingIOError):
        try:
            return not peer.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return False
