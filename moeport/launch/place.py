"""Where the launchers of a job meet, tried before any of them starts: they wait for minutes, and end in tracebacks."""

from __future__ import annotations

import socket
import time

from moeport.errors import MeetingError
from moeport.launch.addresses import addresses_of, listening_at, reason_of

NAME_SECONDS = 3.0
"""Time in which a name must begin to resolve."""


def check_place(launcher: str, host: str, port: int, is_first: bool) -> None:
    """Raises MeetingError if the host does not resolve or, on the first node, the port is in use."""
    deadline = time.monotonic() + NAME_SECONDS
    addresses = addresses_of(host, port, deadline, f"--master-addr {host}", "node 0")
    if not is_first:
        return
    try:
        everywhere = launcher == "torchrun"  # it listens at all addresses, whatever it is told
        for listener in listening_at([] if everywhere else addresses, port):
            listener.close()
    except OSError as error:
        raise MeetingError(
            f"--master-port {port}: {launcher} cannot listen on port {port} of {socket.gethostname()} "
            f"({reason_of(error)}); end what uses it, or set --master-port to a free port on every node"
        ) from error
