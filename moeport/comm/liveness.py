"""When one process of a job dies, all of them stop, with one message that names the cause.

A blocked collective cannot be interrupted, and a library may return wrong values after an error. Therefore every
process has a thread with a connection to rank 0, and exits through `os._exit` when one of these happens:

* a process dies, which closes its connection. TCP detects a machine that lost power or network within 30 s;
* a collective raises an exception: the rank reports it to rank 0, which informs all others;
* a collective takes longer than the timeout: rank 0 names the ranks that have not entered it.

Rank 0 decides on the message. It waits briefly after an exception, because libraries raise one, such as "connection
closed by peer", when another process has died. A rank that closes its connection normally says goodbye first.
"""

from __future__ import annotations

import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from moeport.comm.agreement import Topic, disagreement, name_ranks
from moeport.comm.places import plain
from moeport.comm.wire import Message, Peer, Reception, encoded
from moeport.errors import DisagreementError, MoeportError, RunError
from moeport.files import discard_temporaries
from moeport.launch import last_words
from moeport.launch.addresses import listening
from moeport.stopping import asks_to_end

EXIT_CODE = 1
HEARTBEAT_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""Time that rank 0 waits after an exception to learn whether a process has died."""
ANSWER_SECONDS = 10.0
"""Time after which a rank that has reported a failure exits without an answer from rank 0."""
DISCARD_SECONDS = 5.0
"""Longest time in which a process that is stopped deletes what it was writing."""
PARTING_SECONDS = 5.0
"""Time allowed for a last message to arrive."""
MESSAGE_LENGTH = 1000
PURPOSE = b"moeport/watch/1 "


@dataclass(frozen=True)
class Call:
    """One call of a collective."""

    ranks: tuple[int, ...]
    """Global ranks of the communicator."""
    number: int
    """Index of the call on this communicator, counted from 1."""
    name: str
    detail: str = ""
    series: str = ""
    """Calls are numbered within a series."""
    is_patient: bool = False
    """Whether it may take any time."""

    @property
    def key(self) -> str:
        """Names the series among these ranks."""
        return self.series + ",".join(map(str, self.ranks))

    def __str__(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        consecutive = len(self.ranks) > 1 and self.ranks == tuple(range(first, last + 1))
        ranks = f"{first}-{last}" if consecutive else ",".join(map(str, self.ranks))
        return f"{self.name}, call {self.number} of ranks {ranks}"


@dataclass(frozen=True)
class Member:
    """One process of the job."""

    rank: int
    size: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} (host {self.host}, pid {self.pid})"


class Listener:
    """The sockets on which rank 0 waits for the other ranks.

    Args:
        addresses: those at which ranks reach this machine, as they have said; an empty one stands for all.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.sockets = listening([(address, 0) for address in dict.fromkeys(addresses)])
        if len(self.sockets) < len(set(addresses)):  # a translated address, which is not one of this machine
            self.sockets += listening([("", 0)])
        self.ports = {plain(name[0]): name[1] for name in (found.getsockname() for found in self.sockets)}
        self.token = secrets.token_hex(16)
        """A secret that the other ranks must present."""

    def described(self) -> Message:
        """What the other ranks need to know."""
        return {"ports": self.ports, "token": self.token}


def port_at(described: Message, address: str) -> int:
    """The port of a listener for those who reach it at an address."""
    ports: dict[str, int] = described["ports"]
    return ports.get(address) or ports.get("::") or ports["0.0.0.0"]


class Liveness:
    """The watchdog thread of one process and its connections: from rank 0 to all ranks, from all others to rank 0."""

    def __init__(
        self,
        rank: int,
        size: int,
        listener: Listener | None,
        address: tuple[str, int],
        token: str,
        timeout_s: float,
    ):
        """Connects, and returns once every rank has connected.

        Args:
            rank: rank of this process.
            size: number of processes.
            listener: the listener, on rank 0 only.
            address: host and port of rank 0's listener.
            token: token of rank 0's listener.
            timeout_s: longest time that a call may take, and that the ranks may take to connect.

        Raises RunError if a rank does not connect.
        """
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._current: tuple[Call | None, float] = (None, 0.0)  # with its start; one value, for the thread reads it
        self._last_call = "none"
        self._entered: dict[str, int] = {}
        self._events: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._failure: Message | None = None
        self._deadline = float("inf")
        self._previous_handler: Any = None
        self._verdicts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._topics: dict[int, dict[int, Any]] = {}
        self._agreements = 0
        self._reasons: dict[int, str] = {}
        self._released = False
        me = Member(rank, size, socket.gethostname(), os.getpid())
        if listener:
            self._peers, self.members = _accept(listener, me, timeout_s)
        else:
            self._peers, self.members = _connect(address, token, me, timeout_s)
        self._connections = [peer.connection for peer in self._peers.values()]
        hosts = list(dict.fromkeys(member.host for member in self.members))
        self.nodes = tuple(hosts.index(member.host) for member in self.members)
        """Node number of each rank, determined by host name."""
        self._wake_receiver, self._wake_sender = socket.socketpair()
        os.register_at_fork(after_in_child=self._close_sockets)  # or a child would keep a dead parent's connection open
        self._thread = threading.Thread(target=self._run, name="moeport-liveness", daemon=True)
        self._thread.start()
        self._wait_at_sigterm()

    # ------------------------------------------------------------------ called by the main thread

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """Watches a collective while the block runs; an exception in it stops the job."""
        outer = self._current
        self._entered[call.key] = max(call.number, self._entered.get(call.key, 0))
        self._last_call = str(call)
        self._current = (call, time.monotonic())
        try:
            yield
        except Exception as error:
            self.fail(error)
        finally:
            self._current = outer

    def agree(self, topics: Sequence[Topic], is_patient: bool = False) -> None:
        """Compares what every rank must have alike; every rank calls it.

        Args:
            topics: what is compared; none: the ranks wait for each other.
            is_patient: whether that may take longer than the timeout.

        Raises DisagreementError, the same on every rank, if they do not.
        """
        self._agreements += 1
        call = Call(
            tuple(range(self._size)), self._agreements, "comparison", series="comparison ", is_patient=is_patient
        )
        with self.call(call):
            sent = [topic.sent() for topic in topics]
            self._post({"kind": "agree", "rank": self._rank, "number": self._agreements, "topics": sent})
            text = self._verdicts.get()
        if text:
            raise DisagreementError(text)

    def fail(self, error: Exception) -> NoReturn:
        """Stops every process with the message of `error`.

        If all ranks fail with the same error of moeport's, it is raised instead: each then says it in its own words.
        """
        self._error = error
        call, _ = self._current
        where = f"in {call} ({call.detail})" if call else "outside collectives"
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        text = f"{self.members[self._rank]} failed {where}: {type(error).__name__}: {reason}"
        known = isinstance(error, MoeportError)
        code = error.exit_code if isinstance(error, MoeportError) else EXIT_CODE
        same = f"{type(error).__name__}: {error}" if known and not call else ""
        self._post({"kind": "failure", "rank": self._rank, "text": text, "code": code, "same": same})
        self._thread.join()
        if self._released:
            self._leave()
            raise error
        os._exit(code)

    @property
    def is_over(self) -> bool:
        """Whether this process has left the job."""
        return self._released

    def close(self) -> None:
        """Says goodbye, after which the death of other processes is ignored."""
        if not self._released:
            self._released = True
            self._post({"kind": "goodbye"})
            self._thread.join()
            self._leave()

    def _leave(self) -> None:
        self._close_sockets()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _post(self, event: Message) -> None:
        self._events.put(event)
        self._wake_sender.send(b"\0")

    def _wait_at_sigterm(self) -> None:
        """Launchers send SIGTERM as soon as a process dies; this gives the thread time to report the cause first."""
        if threading.current_thread() is threading.main_thread() and asks_to_end(signal.getsignal(signal.SIGTERM)):
            self._previous_handler = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._thread.join(2 * GRACE_SECONDS)
        signal.signal(signal.SIGTERM, self._previous_handler)
        signal.raise_signal(signal.SIGTERM)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:
            traceback.print_exc()  # a job never runs without its watchdog
            os._exit(EXIT_CODE)

    def _watch(self) -> None:
        late: Call | None = None
        next_beat = 0.0
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            for rank, peer in self._peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, rank)
            while True:
                now = time.monotonic()
                for key, _ in selector.select(min(max(next_beat - now, 0), max(self._deadline - now, 0))):
                    if key.data is None:
                        self._wake_receiver.recv(1 << 10)
                    elif key.data in self._peers:
                        self._read(key.data)
                while not self._events.empty():
                    event = self._events.get()
                    if event["kind"] == "goodbye":
                        self._part(event)
                        return
                    self._report(event)
                if self._error and self._released:
                    return
                now, (call, started) = time.monotonic(), self._current
                if call and not call.is_patient and call is not late and now - started > self._timeout_s:
                    late = call
                    event = {"rank": self._rank, "ranks": call.ranks, "key": call.key, "number": call.number}
                    self._report({"kind": "late", "in": str(call), **event})
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_SECONDS
                    if self._rank and self._peers:
                        self._peers[0].send(self._state())
                if now >= self._deadline and self._failure:
                    self._end(self._failure)

    def _state(self) -> Message:
        call, _ = self._current
        detail = call.detail if call else ""
        return {"kind": "state", "last": self._last_call, "entered": dict(self._entered), "detail": detail}

    def _report(self, event: Message) -> None:
        """Reports an event of this process to rank 0."""
        if self._rank == 0:
            self._consider(event)
            return
        text = event.get("text") or f"{self.members[self._rank]} has waited {self._timeout_s:g} s in {event.get('in')}"
        if not self._peers:
            self._end(event | {"text": text})
        self._peers[0].send(self._state())
        self._peers[0].send(event)
        if event["kind"] != "agree" and self._failure is None:
            self._failure = event | {"text": f"{text}; {self.members[0]} does not answer"}
            self._deadline = time.monotonic() + ANSWER_SECONDS

    def _read(self, rank: int) -> None:
        peer = self._peers[rank]
        messages = peer.receive()
        if messages is None:
            self._lose(rank)
            return
        for message in messages:
            if message["kind"] == "state":
                peer.state = message
            elif message["kind"] == "goodbye":
                self._selector.unregister(peer.connection)
                del self._peers[rank]
            elif message["kind"] == "end":
                self._stop(message)
            elif message["kind"] == "verdict":
                self._verdicts.put(message["text"])
            elif message["kind"] == "raise":
                self._released = True
            else:
                self._consider(message)

    def _lose(self, rank: int) -> None:
        """Handles a connection that closed without a goodbye."""
        call, _ = self._current
        where = f"in {call}" if call else f"outside collectives (last: {self._last_call})"
        self._end({"rank": rank, "text": f"{self.members[rank]} died; rank {self._rank} was {where}"})

    def _consider(self, event: Message) -> None:
        """On rank 0, decides what to do about a failure or a late call."""
        if event["kind"] == "late":
            self._end({"rank": event["rank"], "text": self._lateness(event)})
        elif event["kind"] == "agree":
            self._compare(event)
        else:
            self._reasons[event["rank"]] = event["same"]
            if len(self._reasons) == self._size and event["same"] and len(set(self._reasons.values())) == 1:
                self._released = True
                self._part({"kind": "raise"})
            elif self._failure is None:
                self._failure = event
                self._deadline = time.monotonic() + GRACE_SECONDS

    def _compare(self, event: Message) -> None:
        topics = self._topics.setdefault(event["number"], {})
        topics[event["rank"]] = event["topics"]
        if len(topics) == self._size:
            text = disagreement([topics[rank] for rank in range(self._size)])
            for peer in self._peers.values():
                peer.send({"kind": "verdict", "text": text})
            self._verdicts.put(text)
            del self._topics[event["number"]]

    def _lateness(self, event: Message) -> str:
        key, number = event["key"], event["number"]
        states = {rank: peer.state for rank, peer in self._peers.items()} | {0: self._state()}
        absent = [
            f"{self.members[rank]}, last collective: {states.get(rank, {}).get('last', 'none')}"
            for rank in event["ranks"]
            if states.get(rank, {}).get("entered", {}).get(key, 0) < number
        ]
        waits = f"{self.members[event['rank']]} has waited {self._timeout_s:g} s in {event['in']}"
        if absent:
            return f"{waits}; not there: {'; '.join(absent)}"
        details = "; ".join(
            f"rank {rank}: {states[rank].get('detail', '')}" for rank in event["ranks"] if rank in states
        )
        return f"{waits}; every rank has entered it ({details})"

    def _end(self, failure: Message) -> NoReturn:
        """Informs the others, then exits."""
        code = failure.get("code", EXIT_CODE)
        message = {"kind": "end", "rank": failure["rank"], "text": failure["text"], "code": code}
        self._stop(message, tell=self._rank == 0)

    def _stop(self, message: Message, tell: bool = False) -> NoReturn:
        if message["rank"] == self._rank and self._error and not isinstance(self._error, MoeportError):
            traceback.print_exception(self._error)
        sentence = f"moeport: {message['text']}; every rank stops"
        os.write(2, f"{sentence}\n".encode())
        last_words.leave(sentence, message["code"])
        flush = threading.Thread(target=_flush, daemon=True)  # the main thread may hold a stream's lock forever
        flush.start()
        discard = threading.Thread(target=discard_temporaries, daemon=True)  # storage may not answer
        discard.start()
        if tell:
            self._part(message)
        flush.join(1)
        discard.join(DISCARD_SECONDS)
        os._exit(message["code"])

    def _part(self, message: Message) -> None:
        """Sends a last message to every peer and waits briefly for its arrival."""
        for peer in self._peers.values():
            peer.send(message)
        deadline = time.monotonic() + PARTING_SECONDS
        for peer in self._peers.values():
            peer.finish(deadline)

    def _close_sockets(self) -> None:
        for connection in (self._wake_receiver, self._wake_sender, *self._connections):
            connection.close()


def _accept(listener: Listener, me: Member, timeout_s: float) -> tuple[dict[int, Peer], list[Member]]:
    peers: dict[int, Peer] = {}
    members = {0: me}

    def admit(peer: Peer, hello: Message) -> None:
        member = Member(int(hello["rank"]), me.size, str(hello["host"]), int(hello["pid"]))
        if not 0 < member.rank < me.size or member.rank in peers:
            raise ValueError("not a rank that is expected")
        peers[member.rank], members[member.rank] = peer, member

    reception = Reception(listener.sockets, PURPOSE, listener.token.encode())
    try:
        reception.receive(admit, lambda: len(members) < me.size, time.monotonic() + timeout_s)
    finally:
        for found in listener.sockets:
            found.close()
    if absent := [rank for rank in range(me.size) if rank not in members]:
        raise RunError(f"{name_ranks(absent)} did not connect to rank 0 within {timeout_s:g} s")
    everyone = [members[rank] for rank in range(me.size)]
    for peer in peers.values():
        peer.send({"kind": "welcome", "members": [(member.host, member.pid) for member in everyone]})
    return peers, everyone


def _connect(
    address: tuple[str, int], token: str, me: Member, timeout_s: float
) -> tuple[dict[int, Peer], list[Member]]:
    deadline = time.monotonic() + timeout_s
    try:
        peer = Peer(socket.create_connection(address, timeout=timeout_s))
        hello = {"rank": me.rank, "host": me.host, "pid": me.pid}
        peer.connection.sendall(PURPOSE + token.encode() + encoded(hello))
        welcome = peer.next(deadline)
    except (OSError, ValueError) as error:
        raise RunError(f"rank {me.rank} cannot reach rank 0 at {address[0]}, port {address[1]}: {error}") from error
    return {0: peer}, [Member(rank, me.size, *member) for rank, member in enumerate(welcome["members"])]


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
