"""Addresses at which the processes of a job meet: resolved, listened on, reached."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

from moeport.errors import MeetingError
from moeport.launch.addresses import Address, addresses_of, listening_at, reason_of
from moeport.launch.launcher import Launch

NAME_SECONDS = 10.0
"""Time in which a name must begin to resolve: that of a host that was just started may come late."""
CONNECT_SECONDS = 10.0
"""Time in which a host must answer one attempt."""
GREETING = b"moeport/meeting/1\n"
"""What a process at whose address ranks meet sends to each that comes."""
GREETING_SECONDS = 5.0
"""Time in which it does; other programs are silent."""


def resolved(launch: Launch, deadline: float) -> list[Address]:
    """The addresses of the launcher's host. Raises MeetingError if the name does not resolve by `deadline`."""
    return addresses_of(launch.host, launch.port, deadline, launch.variables.host, launch.host_role)


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
    """Sockets that listen at the launcher's address and port, and only there where possible.

    Raises MeetingError if the port is in use.
    """
    addresses = resolved(launch, time.monotonic() + min(NAME_SECONDS, 1.0))
    everywhere = _is_local_name(launch, addresses)
    try:
        return listening_at([] if everywhere else addresses, launch.port)
    except OSError as error:
        rank, port = launch.variables.rank, launch.variables.port
        user = "end what uses it"
        if error.errno == errno.EADDRINUSE and _ranks_meet_at(addresses):
            user = f"other ranks meet there, so if it is this job that has two of rank 0, correct {rank}"
        raise MeetingError(
            f"{port}: {launch.host_role} cannot listen on port {launch.port} of {socket.gethostname()} "
            f"({reason_of(error)}); {user}, or set {port} to a free port on every rank"
        ) from error


def greets(connection: socket.socket, deadline: float) -> bool:
    """Whether ranks meet at the other end."""
    received = b""
    with suppress(OSError):
        while len(received) < len(GREETING):
            connection.settimeout(max(min(GREETING_SECONDS, deadline - time.monotonic()), 0.05))
            data = connection.recv(len(GREETING) - len(received))
            if not data:
                break
            received += data
    return received == GREETING


def _ranks_meet_at(addresses: Sequence[Address]) -> bool:
    with suppress(OSError), reached(addresses, time.monotonic() + 1.0) as connection:
        return greets(connection, time.monotonic() + 1.0)
    return False


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
