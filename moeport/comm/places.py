"""Addresses at which the processes of a job meet: resolved, listened on, reached."""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from moeport.errors import MeetingError
from moeport.launch.launcher import Launch

NAME_SECONDS = 10.0
"""Time in which a name must begin to resolve: that of a host that was just started may come late."""
CONNECT_SECONDS = 10.0
"""Time in which a host must answer one attempt."""

Address = tuple[socket.AddressFamily, Any]
"""Family and socket address."""


def pauses() -> Iterator[float]:
    """Seconds between attempts, without end."""
    return itertools.chain((0.05, 0.1, 0.2, 0.5), itertools.repeat(1.0))


def resolved(launch: Launch, deadline: float) -> list[Address]:
    """The addresses of the launcher's host. Raises MeetingError if the name does not resolve by `deadline`."""
    for pause in pauses():
        try:
            found = socket.getaddrinfo(launch.host, launch.port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys((entry[0], entry[4]) for entry in found))
        except (OSError, UnicodeError) as error:
            if time.monotonic() + pause > deadline:
                reason = getattr(error, "strerror", None) or str(error)
                raise MeetingError(
                    f"{launch.variables.host}: the host name {launch.host!r} does not resolve on "
                    f"{socket.gethostname()} ({reason}); expected the name or address of the host of "
                    f"{launch.host_role}"
                ) from error
            time.sleep(pause)
    raise AssertionError


def reached(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """A connection to the first address that answers; OSError if none does."""
    problem: OSError | None = None
    for family, address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(min(CONNECT_SECONDS, deadline - time.monotonic()), 0.05))
            connection.connect(address)
            if connection.getsockname() == connection.getpeername():  # TCP can connect a free port to itself
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem or OSError("the name has no address")


def bound(launch: Launch) -> list[socket.socket]:
    """Sockets that listen at the launcher's address and port, and nowhere else where that can be.

    Raises MeetingError if the port is in use.
    """
    addresses = resolved(launch, time.monotonic() + min(NAME_SECONDS, 1.0))
    everywhere = _is_local_name(launch, addresses)
    try:
        found = [] if everywhere else listening([address for _, address in addresses])
        return found or listening([("", launch.port)])
    except OSError as error:
        reason = error.strerror or str(error)
        raise MeetingError(
            f"{launch.variables.port}: {launch.host_role} cannot listen on port {launch.port} of "
            f"{socket.gethostname()} ({reason}); end what uses it, or set {launch.variables.port} to a free port on "
            "every rank"
        ) from error


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


def plain(address: str) -> str:
    """An address without the prefix that IPv6 sockets give to IPv4 ones."""
    return address.removeprefix("::ffff:").partition("%")[0]


def _is_local_name(launch: Launch, addresses: Sequence[Address]) -> bool:
    """Whether the name means this machine alone here, and may mean its network address elsewhere (127.0.1.1)."""
    if launch.host == "localhost" or (launch.local_size is not None and launch.local_size >= launch.size):
        return False
    try:
        ipaddress.ip_address(launch.host)
        return False
    except ValueError:
        return any(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in addresses)
