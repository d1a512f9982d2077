"""What `moeport --version` prints."""

from __future__ import annotations

import platform
from importlib import metadata

from moeport.facts import BACKENDS
from moeport.version import VERSION, commit, described


def text() -> str:
    """The versions of moeport, of Python and of the frameworks; imports none of these."""
    found = {name: _installed(name) for name in _frameworks()}
    return "\n".join(
        [
            f"moeport {VERSION} ({described(commit())})",
            f"Python {platform.python_version()}, {platform.platform()}",
            *(f"{name} {version or 'not installed'}" for name, version in found.items()),
        ]
    )


def _frameworks() -> dict[str, None]:
    """The distributions that backends need or load, in the order of the backends."""
    return dict.fromkeys(name for facts in BACKENDS.values() for name in (facts.framework, *facts.extensions))


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
