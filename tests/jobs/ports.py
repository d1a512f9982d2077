"""Ports for the jobs of the tests."""

import random
import socket

RANGE = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections (32768 and up), so that none of those takes a port between
the moment it is chosen and the moment a job listens there."""
_given = set()


def free_port():
    """A port that nobody listens on, and that this process has not been given before."""
    while True:
        port = random.SystemRandom().choice(RANGE)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port


def _is_free(port):
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False
