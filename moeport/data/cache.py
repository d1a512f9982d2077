"""Where prepared data is cached, and how files are written atomically."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir(configured: Path | None) -> Path:
    """The configured folder, or $XDG_CACHE_HOME/moeport, or ~/.cache/moeport."""
    if configured is not None:
        return configured.expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moeport"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
