"""What ranks on this machine can communicate over, and what can start them."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeport.errors import MoeportError
from moeport.launch.emulation import require

CLASS = Path("/sys/class/net")
LAUNCHERS = ("torchrun", "msrun", "mpirun", "srun")
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
"""Environment variables that name the interface that a communication library uses."""
_ADDRESS_OF_INTERFACE = 0x8915
"""Linux's SIOCGIFADDR."""


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces: `name`, `address` (IPv4, or None), `up`, and `mbit_per_second` where the driver knows it."""
    return [
        {
            "name": name,
            "address": _address(name),
            "up": (_said(name, "operstate") or "unknown") not in ("down", "lowerlayerdown", "notpresent"),
            "mbit_per_second": _speed(name),
        }
        for _, name in socket.if_nameindex()
    ]


def interface_towards(host: str) -> str | None:
    """Name of the interface of this machine from which a host is reached; None if it is not known, or its own only."""
    with suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((host, 9))  # of a datagram socket: chooses a way, and sends nothing
        own = asking.getsockname()[0]
        found = [each["name"] for each in interfaces() if each["address"] == own]
        return found[0] if found and found[0] != "lo" else None
    return None


def network() -> dict[str, Any]:
    """Interfaces, those that the environment chooses, launchers on the path, and whether clusters can be emulated."""
    return {
        "host": socket.gethostname(),
        "interfaces": interfaces(),
        "chosen": {name: os.environ[name] for name in CHOICES if name in os.environ},
        "launchers": {name: shutil.which(name) for name in LAUNCHERS},
        "emulation": {name: shutil.which(name) for name in ("ip", "tc")} | {"problem": emulation_problem()},
    }


def emulation_problem() -> str | None:
    """Why `moeport emulate` cannot work here; None if it can. Tries what it needs, and leaves nothing behind."""
    try:
        require()
    except (MoeportError, OSError) as error:
        return str(error)
    return None


def _address(name: str) -> str | None:
    """The IPv4 address of an interface."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            request = struct.pack("256s", name.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(asking.fileno(), _ADDRESS_OF_INTERFACE, request)[20:24])
    except (ImportError, OSError):
        return None


def _speed(name: str) -> int | None:
    text = _said(name, "speed")
    return int(text) if text and text.isdecimal() else None


def _said(name: str, what: str) -> str | None:
    """What Linux says of an interface."""
    try:
        return (CLASS / name / what).read_text().strip()
    except OSError:
        return None
