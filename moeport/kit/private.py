"""What names a machine, a person or a place, taken out of everything that the kit writes."""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import site
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeport.parity.recording import ENVIRONMENT_VARIABLES

VARIABLES = (
    *ENVIRONMENT_VARIABLES,
    "ASCEND_GLOBAL_LOG_LEVEL",
    "CPU_AFFINITY_CONF",
    "CUDA_LAUNCH_BLOCKING",
    "HCCL_ALGO",
    "HCCL_BUFFSIZE",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_OP_EXPANSION_MODE",
    "MULTI_STREAM_MEMORY_REUSE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_NPU_FALLBACK_CPU_DISABLE",
)
"""Environment variables whose values are kept: switches and numbers of frameworks and communication libraries."""
LEFT_OUT = (
    "host names, user names, paths outside of system folders, IP and MAC addresses, web and mail addresses, and every "
    "environment variable other than switches of frameworks and communication libraries"
)
"""What whoever sends the file is told."""
SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")
"""Folders that are alike on every machine."""
COMMON_NAMES = {"", "root", "localhost", "user", "ubuntu", "ec2-user", "admin"}
"""Users and hosts that name nobody."""
LEAST = 6
"""Characters from which the value of an environment variable is looked for."""

_PATH = re.compile(r"(?<![\w./<>~-])/(?:[^\s/:'\"`,;()\[\]{}<>|]+/)*[^\s/:'\"`,;()\[\]{}<>|]+")
_BELOW_HOME = re.compile(r"~(?:/[^\s/:'\"`,;()\[\]{}<>|]+)+")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>)\]]+", re.IGNORECASE)
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_MAC = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{2}[:-]){5,7}[0-9a-fA-F]{2}(?![\w:])")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9a-fA-F:]*:[0-9a-fA-F]*:)[0-9a-fA-F:]{2,}(?:%\w+)?(?![\w:])")
_HARMLESS = {"127.0.0.1", "0.0.0.0", "::1", "::"}


class Scrubber:
    """Replaces what is private in texts.

    Args:
        environment: the variables of the process; default: this one's.
        folders: further folders, and what takes the place of each.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, folders: Mapping[str, str] | None = None):
        values = os.environ if environment is None else environment
        known = {**_places(values), **(folders or {})}
        self._places = sorted(known.items(), key=lambda item: -len(item[0]))
        words = {**_secrets(values), **_names(values)}
        self._words = sorted(words.items(), key=lambda item: -len(item[0]))

    def text(self, text: str) -> str:
        """A text without what is private."""
        for path, name in self._places:
            text = re.sub(rf"(?<![\w.]){re.escape(path)}(?![\w.-])", name, text)
        for word, name in self._words:
            text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", name, text, flags=re.IGNORECASE)
        for pattern, replace in _PATTERNS:
            text = pattern.sub(replace, text)
        return text

    def value(self, value: Any) -> Any:
        """A value for JSON without what is private, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        return value


def kept_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that are kept."""
    return {name: environment[name] for name in VARIABLES if name in environment}


def _places(environment: Mapping[str, str]) -> dict[str, str]:
    """Folders whose names may be private, and what takes their place."""
    found = {tempfile.gettempdir(): "<tmp>", os.getcwd(): "<here>", str(Path.home()): "~"}
    found |= {environment[name]: "<tmp>" for name in ("TMPDIR", "TEMP", "TMP") if environment.get(name)}
    if environment.get("HOME"):
        found[environment["HOME"]] = "~"
    found |= dict.fromkeys([*site.getsitepackages(), *sys.path], "<packages>")
    found |= {sys.prefix: "<python>", sys.base_prefix: "<python>", str(Path(__file__).parents[2]): "<packages>"}
    real = {os.path.realpath(path): name for path, name in found.items() if path}
    return {path.rstrip("/"): name for path, name in {**real, **found}.items() if _worth_hiding(path)}


def _worth_hiding(path: str) -> bool:
    return os.path.isabs(path) and path.rstrip("/") not in ("", *SYSTEM) and not _is_system(path)


def _is_system(path: str) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in SYSTEM)


def _names(environment: Mapping[str, str]) -> dict[str, str]:
    """Names of the host and of the user."""
    host = socket.gethostname()
    hosts = {host, environment.get("HOSTNAME", ""), environment.get("HOST", "")}
    hosts |= {name.partition(".")[0] for name in hosts}
    users = {environment.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with suppress(OSError, KeyError):  # a user without a name
        users.add(getpass.getuser())
    users.add(Path.home().name)
    found = {name: "<user>" for name in users if name.lower() not in COMMON_NAMES}
    return found | {name: "<host>" for name in hosts if name.lower() not in COMMON_NAMES}


def _secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of variables that are not kept: tokens, names of projects and of clusters."""
    kept = {value for name, value in environment.items() if name in VARIABLES}
    return {
        value: "<variable>"
        for name, value in environment.items()
        if name not in VARIABLES and value not in kept and len(value) >= LEAST and not _is_plain(value)
    }


def _is_plain(value: str) -> bool:
    """Whether a value is a number or a path of the system, which says nothing of anybody."""
    return value.replace(".", "").isdigit() or all(_is_system(part) for part in value.split(os.pathsep))


def _path(found: re.Match[str]) -> str:
    path = found.group()
    return path if _is_system(path) or path.count("/") < 2 else f"<path>/{path.rpartition('/')[2]}"


def _below_home(found: re.Match[str]) -> str:
    return f"~/…/{found.group().rpartition('/')[2]}"


def _address(found: re.Match[str]) -> str:
    text = found.group()
    if text in _HARMLESS:
        return text
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text
    return "<address>"


_PATTERNS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_URL, "<url>"),
    (_MAIL, "<mail>"),
    (_MAC, "<address>"),
    (_IPV6, _address),
    (_IPV4, _address),
    (_BELOW_HOME, _below_home),
    (_PATH, _path),
)
