"""Messages between the processes of a job: one JSON object a line, over TCP.

A connection is a stranger until its first line is right. Strangers are read without waiting for any of them: one whose
first bytes are wrong, whose line is too long or who takes too long is dropped, so port scans, garbage and connections
that trickle do not hold up a job.
"""

from __future__ import annotations

import hmac
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

SILENCE_SECONDS = 30
"""Time after which TCP gives up on a machine that does not answer."""
FIRST_LINE_SECONDS = 10.0
"""Time in which a connection must show that it belongs to the job."""
MAX_STRANGERS = 128
"""Number of connections that may be in that state; the oldest gives way to a new one."""
MAX_FIRST_LINE = 1 << 18
MAX_LINE = 1 << 26
"""Longest message in bytes."""


class Peer:
    """A connection to another process, which carries one JSON message per line."""

    def __init__(self, connection: socket.socket, received: bytes = b""):
        self.connection = connection
        self.state: Message = {}
        self._buffer = received
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000}
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Sends a message. A broken connection is noticed when reading."""
        with suppress(OSError):
            self.connection.sendall(encoded(message))

    def receive(self) -> list[Message] | None:
        """Waits for data and returns the complete messages; None once the connection is closed."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return None if len(self._buffer) > MAX_LINE else [json.loads(line) for line in lines]

    def next(self, deadline: float | None = None) -> Message:
        """The next message; OSError if none has come by `deadline`, on the clock of `time.monotonic`.

        What follows it stays in the socket, for `receive`, which waits for the socket.
        """
        while b"\n" not in self._buffer:
            self.connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.01))
            seen = self.connection.recv(1 << 16, socket.MSG_PEEK)
            if not seen:
                raise ConnectionResetError("the connection was closed")
            self._buffer += self.connection.recv(seen.find(b"\n") + 1 or len(seen))
        self.connection.settimeout(None)
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: Message = json.loads(line)
        return message

    def finish(self, deadline: float) -> None:
        """Stops sending and reads until the other side closes; closing with unread data would discard what was sent."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.wait_closed(deadline)

    def wait_closed(self, deadline: float) -> None:
        """Reads until the other side closes: the side that closes first keeps the port in use for a while."""
        with suppress(OSError):
            while time.monotonic() < deadline:
                self.connection.settimeout(max(deadline - time.monotonic(), 0.01))
                if not self.connection.recv(1 << 16):
                    return


def encoded(message: Message) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


@dataclass
class _Stranger:
    connection: socket.socket
    deadline: float
    received: bytes = b""


@dataclass
class Reception:
    """Takes connections on some sockets, and passes on those that give the right first line.

    That line is `purpose`, then `secret`, then a JSON object.
    """

    listeners: Iterable[socket.socket]
    purpose: bytes
    """What a first line starts with, such as `moeport/watch `."""
    secret: bytes = b""
    """What follows, known to the processes of the job alone; compared as a whole."""
    greeting: bytes = b""
    """Sent to each new connection."""
    _strangers: list[_Stranger] = field(default_factory=list)

    def receive(self, admit: Callable[[Peer, Message], None], wanted: Callable[[], bool], deadline: float) -> None:
        """Serve until nothing more is wanted or until the deadline.

        Args:
            admit: takes each connection that belongs to the job, with the object of its first line; it raises
                ValueError, KeyError or TypeError for one that does not belong after all.
            wanted: whether to go on.
            deadline: on the clock of `time.monotonic`.
        """
        with selectors.DefaultSelector() as selector:
            for listener in self.listeners:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ)
            try:
                while wanted() and time.monotonic() < deadline:
                    self._drop_late(selector)
                    for key, _ in selector.select(min(0.2, max(deadline - time.monotonic(), 0.0))):
                        if key.data is None:
                            self._take(selector, key.fileobj)
                        elif key.data in self._strangers and self._read(selector, key.data, admit) and not wanted():
                            break
            finally:
                for stranger in list(self._strangers):
                    self._drop(selector, stranger)

    def _take(self, selector: selectors.BaseSelector, listener: Any) -> None:
        try:
            connection, _ = listener.accept()
            connection.setblocking(False)
            connection.send(self.greeting)
        except OSError:
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self._drop(selector, self._strangers[0])
        stranger = _Stranger(connection, time.monotonic() + FIRST_LINE_SECONDS)
        self._strangers.append(stranger)
        selector.register(connection, selectors.EVENT_READ, stranger)

    def _read(
        self, selector: selectors.BaseSelector, stranger: _Stranger, admit: Callable[[Peer, Message], None]
    ) -> bool:
        """Whether the connection was admitted."""
        try:
            data = stranger.connection.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        stranger.received += data
        if not data or not self._may_belong(stranger.received):
            self._drop(selector, stranger)
            return False
        if b"\n" not in stranger.received:
            return False
        line, rest = stranger.received[len(self.purpose) + len(self.secret) :].split(b"\n", 1)
        selector.unregister(stranger.connection)
        self._strangers.remove(stranger)
        try:
            admit(Peer(stranger.connection, rest), json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError, OSError):
            stranger.connection.close()
            return False
        return True

    def _may_belong(self, received: bytes) -> bool:
        """Whether a first line may start so."""
        purpose, secret = self.purpose, self.secret
        start = received[: len(purpose)]
        if not purpose.startswith(start) or len(received) > MAX_FIRST_LINE:
            return False
        shown = received[len(purpose) :][: len(secret)]
        if len(shown) < len(secret):
            return b"\n" not in received
        return hmac.compare_digest(shown, secret)

    def _drop_late(self, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        for stranger in [stranger for stranger in self._strangers if stranger.deadline < now]:
            self._drop(selector, stranger)

    def _drop(self, selector: selectors.BaseSelector, stranger: _Stranger) -> None:
        selector.unregister(stranger.connection)
        self._strangers.remove(stranger)
        stranger.connection.close()
