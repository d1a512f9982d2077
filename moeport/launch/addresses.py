"""Names of hosts resolved, and addresses listened at."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from moeport.errors import MeetingError

Address = tuple[socket.AddressFamily, Any]
"""Family and socket address."""


def pauses() -> Iterator[float]:
    """Seconds between attempts, without end."""
    return itertools.chain((0.05, 0.1, 0.2, 0.5), itertools.repeat(1.0))


def addresses_of(host: str, port: int, deadline: float, asked: str, role: str) -> list[Address]:
    """The addresses of a host. Raises MeetingError if its name does not resolve by `deadline`.

    Args:
        host: its name or address.
        port: where somebody listens there.
        deadline: on the clock of `time.monotonic`.
        asked: option or variable in which the user has named the host.
        role: who listens there.
    """
    for pause in pauses():
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys((entry[0], entry[4]) for entry in found))
        except (OSError, UnicodeError) as error:
            if time.monotonic() + pause > deadline:
                why = getattr(error, "strerror", None) or str(error)
                raise MeetingError(
                    f"{asked}: the host name {host!r} does not resolve on {socket.gethostname()} ({why}); "
                    f"expected the name or address of the host of {role}"
                ) from error
            time.sleep(pause)
    raise AssertionError


def listening_at(addresses: Sequence[Address], port: int) -> list[socket.socket]:
    """Sockets on those of the addresses that this machine has; on all of its own if it has none. Raises OSError."""
    return listening([address for _, address in addresses]) or listening([("", port)])


def listening(addresses: Sequence[Any]) -> list[socket.socket]:
    """Sockets on those of the addresses that this machine has; an empty one stands for all. Raises OSError."""
    sockets: list[socket.socket] = []
    for address in addresses:
        try:
            if not address[0]:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                sockets.append(socket.create_server(address, family=family, dualstack_ipv6=both, backlog=1024))
            else:
                family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
                sockets.append(socket.create_server(address, family=family, backlog=1024))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            for found in sockets:
                found.close()
            raise
    return sockets


def reason_of(error: OSError) -> str:
    """Why, in the system's words alone: Python adds the address to some."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
