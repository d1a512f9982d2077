"""Where prepared data is cached."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(configured: Path | None) -> Path:
    """The configured folder, or $XDG_CACHE_HOME/moeport, or ~/.cache/moeport."""
    if configured is not None:
        return configured.expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moeport"
