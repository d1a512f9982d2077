"""Where prepared data is cached."""

from __future__ import annotations

import os
from pathlib import Path

from moeport.paths import expanded


def cache_dir(configured: Path | None) -> Path:
    """The configured folder, or $XDG_CACHE_HOME/moeport, or ~/.cache/moeport."""
    if configured is not None:
        return configured
    return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "moeport"
