"""What `moeport --version` prints."""

from __future__ import annotations

import platform
from importlib import metadata

from moeport.facts import BACKENDS
from moeport.version import VERSION, commit

DIGITS = 12
"""Digits of a commit that are shown."""


def text() -> str:
    """The versions of moeport, of Python and of the frameworks; imports none of these."""
    found = {name: _installed(name) for name in _frameworks()}
    return "\n".join(
        [
            f"moeport {VERSION} ({_commit()})",
            f"Python {platform.python_version()}, {platform.platform()}",
            *(f"{name} {version or 'not installed'}" for name, version in found.items()),
        ]
    )


def _commit() -> str:
    found = commit()
    if found is None:
        return "commit unknown"
    digits, _, changed = found.partition("-")
    return f"commit {digits[:DIGITS]}{', changed since' if changed else ''}"


def _frameworks() -> dict[str, None]:
    """The distributions that backends need or load, in the order of the backends."""
    return dict.fromkeys(name for facts in BACKENDS.values() for name in (facts.framework, *facts.extensions))


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
