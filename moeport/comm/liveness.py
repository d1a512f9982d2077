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

import json
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from moeport.errors import MoeportError, RunError
from moeport.stopping import asks_to_end

EXIT_CODE = 1
CONNECT_SECONDS = 120
"""Time allowed for all ranks to connect to rank 0."""
HEARTBEAT_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""Time that rank 0 waits after an exception to learn whether a process has died."""
ANSWER_SECONDS = 10.0
"""Time after which a rank that has reported a failure exits without an answer from rank 0."""
PARTING_SECONDS = 5.0
"""Time allowed for a last message to arrive."""
SILENCE_SECONDS = 30
"""Time after which TCP gives up on a machine that does not answer."""
MESSAGE_LENGTH = 1000

Message = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a collective."""

    ranks: tuple[int, ...]
    """Global ranks of the communicator."""
    number: int
    """Index of the call on this communicator, counted from 1."""
    name: str
    detail: str = ""

    def __str__(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        consecutive = len(self.ranks) > 1 and self.ranks == tuple(range(first, last + 1))
        return f"{self.name}, call {self.number} of ranks {f'{first}-{last}' if consecutive else _key(self.ranks)}"


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
    """The socket on which rank 0 waits for the other ranks."""

    def __init__(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.socket = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        self.port: int = self.socket.getsockname()[1]
        self.token = secrets.randbits(31)
        """A secret that the other ranks must present."""


class Peer:
    """A connection to another process, which carries one JSON message per line."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.state: Message = {}
        self._buffer = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000}
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Sends a message. A broken connection is noticed when reading."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Waits for data and returns the complete messages; None once the connection is closed."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def first(self, timeout_s: float) -> Message:
        """The first message, read bytewise so as not to consume the next; OSError or ValueError if none arrives."""
        self.connection.settimeout(timeout_s)
        line = b""
        while not line.endswith(b"\n"):
            byte = self.connection.recv(1)
            if not byte:
                raise OSError("the connection was closed")
            line += byte
        self.connection.settimeout(None)
        message: Message = json.loads(line)
        return message

    def finish(self, deadline: float) -> None:
        """Stops sending and reads until the other side closes; closing with unread data would discard what was sent."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self.connection.settimeout(max(deadline - time.monotonic(), 0.01))
                if not self.connection.recv(1 << 16):
                    return
        except OSError:
            return


class Liveness:
    """The watchdog thread of one process and its connections: from rank 0 to all ranks, from all others to rank 0."""

    def __init__(
        self, rank: int, size: int, listener: Listener | None, address: tuple[str, int], token: int, timeout_s: float
    ):
        """Connects, and returns once every rank has connected.

        Args:
            rank: rank of this process.
            size: number of processes.
            listener: the listener, on rank 0 only.
            address: host and port of rank 0's listener.
            token: token of rank 0's listener.
            timeout_s: longest time that a call may take.

        Raises RunError if a rank does not connect.
        """
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._call: Call | None = None
        self._call_start = 0.0
        self._last_call = "none"
        self._entered: dict[str, int] = {}
        self._events: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._failure: Message | None = None
        self._deadline = float("inf")
        self._previous_handler: Any = None
        deadline = time.monotonic() + CONNECT_SECONDS
        me = Member(rank, size, socket.gethostname(), os.getpid())
        if listener:
            self._peers, self.members = _accept(listener, me, deadline)
        else:
            self._peers, self.members = _connect(address, token, me, deadline)
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
        outer = self._call, self._call_start
        key = _key(call.ranks)
        self._entered[key] = max(call.number, self._entered.get(key, 0))
        self._last_call = str(call)
        self._call_start, self._call = time.monotonic(), call
        try:
            yield
        except Exception as error:
            self.fail(error)
        finally:
            self._call, self._call_start = outer

    def fail(self, error: Exception) -> NoReturn:
        """Stops every process with the message of `error`."""
        self._error = error
        where = f"in {self._call} ({self._call.detail})" if self._call else "outside collectives"
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        text = f"{self.members[self._rank]} failed {where}: {type(error).__name__}: {reason}"
        self._post({"kind": "failure", "rank": self._rank, "text": text})
        self._thread.join()
        os._exit(EXIT_CODE)

    def close(self) -> None:
        """Says goodbye, after which the death of other processes is ignored."""
        self._post({"kind": "goodbye"})
        self._thread.join()
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
                now, call = time.monotonic(), self._call
                if call and call is not late and now - self._call_start > self._timeout_s:
                    late = call
                    self._report({"kind": "late", "rank": self._rank, "ranks": call.ranks, "number": call.number})
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_SECONDS
                    if self._rank and self._peers:
                        self._peers[0].send(self._state())
                if now >= self._deadline and self._failure:
                    self._end(self._failure)

    def _state(self) -> Message:
        call = self._call
        detail = call.detail if call else ""
        return {"kind": "state", "last": self._last_call, "entered": dict(self._entered), "detail": detail}

    def _report(self, event: Message) -> None:
        """Reports an event of this process to rank 0."""
        if self._rank == 0:
            self._consider(event)
            return
        text = event.get("text", f"{self.members[self._rank]} has waited {self._timeout_s:g} s in {self._last_call}")
        if not self._peers:
            self._end({"rank": self._rank, "text": text})
        self._peers[0].send(self._state())
        self._peers[0].send(event)
        if self._failure is None:
            self._failure = {"rank": self._rank, "text": f"{text}; {self.members[0]} does not answer"}
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
            else:
                self._consider(message)

    def _lose(self, rank: int) -> None:
        """Handles a connection that closed without a goodbye."""
        call = self._call
        where = f"in {call}" if call else f"outside collectives (last: {self._last_call})"
        self._end({"rank": rank, "text": f"{self.members[rank]} died; rank {self._rank} was {where}"})

    def _consider(self, event: Message) -> None:
        """On rank 0, decides what to do about a failure or a late call."""
        if event["kind"] == "late":
            self._end({"rank": event["rank"], "text": self._lateness(event)})
        elif self._failure is None:
            self._failure = event
            self._deadline = time.monotonic() + GRACE_SECONDS

    def _lateness(self, event: Message) -> str:
        key, number = _key(event["ranks"]), event["number"]
        states = {rank: peer.state for rank, peer in self._peers.items()} | {0: self._state()}
        absent = [
            f"{self.members[rank]}, last collective: {states.get(rank, {}).get('last', 'none')}"
            for rank in event["ranks"]
            if states.get(rank, {}).get("entered", {}).get(key, 0) < number
        ]
        waits = f"{self.members[event['rank']]} has waited {self._timeout_s:g} s in {states[event['rank']]['last']}"
        if absent:
            return f"{waits}; not there: {'; '.join(absent)}"
        details = "; ".join(
            f"rank {rank}: {states[rank].get('detail', '')}" for rank in event["ranks"] if rank in states
        )
        return f"{waits}; every rank has entered it ({details})"

    def _end(self, failure: Message) -> NoReturn:
        """Informs the others, then exits."""
        message = {"kind": "end", "rank": failure["rank"], "text": failure["text"]}
        self._stop(message, tell=self._rank == 0)

    def _stop(self, message: Message, tell: bool = False) -> NoReturn:
        if message["rank"] == self._rank and self._error and not isinstance(self._error, MoeportError):
            traceback.print_exception(self._error)
        os.write(2, f"moeport: {message['text']}; every rank stops\n".encode())
        flush = threading.Thread(target=_flush, daemon=True)  # the main thread may hold a stream's lock forever
        flush.start()
        if tell:
            self._part(message)
        flush.join(1)
        os._exit(EXIT_CODE)

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


def _accept(listener: Listener, me: Member, deadline: float) -> tuple[dict[int, Peer], list[Member]]:
    peers: dict[int, Peer] = {}
    members = {0: me}
    with listener.socket:
        while len(members) < me.size:
            listener.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer = Peer(listener.socket.accept()[0])
            except OSError as error:
                absent = ", ".join(str(rank) for rank in range(me.size) if rank not in members)
                raise RunError(f"ranks {absent} did not connect to rank 0 within {CONNECT_SECONDS} s") from error
            try:
                hello = peer.first(ANSWER_SECONDS)
                if hello["token"] != listener.token:
                    raise ValueError("wrong token")
            except (OSError, ValueError, KeyError, TypeError):
                peer.connection.close()  # not a process of this job
                continue
            peers[hello["rank"]] = peer
            members[hello["rank"]] = Member(hello["rank"], me.size, hello["host"], hello["pid"])
    everyone = [members[rank] for rank in range(me.size)]
    for peer in peers.values():
        peer.send({"kind": "welcome", "members": [(member.host, member.pid) for member in everyone]})
    return peers, everyone


def _connect(address: tuple[str, int], token: int, me: Member, deadline: float) -> tuple[dict[int, Peer], list[Member]]:
    try:
        peer = Peer(socket.create_connection(address, timeout=CONNECT_SECONDS))
        peer.send({"kind": "hello", "token": token, "rank": me.rank, "host": me.host, "pid": me.pid})
        welcome = peer.first(max(deadline - time.monotonic(), 0.01))
    except (OSError, ValueError) as error:
        raise RunError(f"rank {me.rank} cannot reach rank 0 at {address[0]}, port {address[1]}: {error}") from error
    return {0: peer}, [Member(rank, me.size, *member) for rank, member in enumerate(welcome["members"])]


def _key(ranks: Any) -> str:
    return ",".join(str(rank) for rank in ranks)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
