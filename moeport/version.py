"""The version of moeport, and the commit of its sources."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VERSION = "0.1.0"
COMMIT_FILE = "commit.txt"
"""The file beside this one in which `setup.py` writes the commit when it builds a wheel or an sdist."""
DIGITS = 12
"""Digits of a commit that are shown."""


def commit() -> str | None:
    """The commit, as `of_checkout` says it; None where neither the build nor git knows it."""
    package = Path(__file__).parent
    written = package / COMMIT_FILE
    return written.read_text(encoding="utf-8").strip() if written.is_file() else of_checkout(package.parent)


def described(found: str | None) -> str:
    """A commit as it is shown: `commit 0123456789ab, changed since`, or `commit unknown`."""
    if found is None:
        return "commit unknown"
    digits, _, changed = found.partition("-")
    return f"commit {digits[:DIGITS]}{', changed since' if changed else ''}"


def of_checkout(root: Path) -> str | None:
    """The commit that is checked out in a folder: 40 digits, and `-dirty` if tracked files were changed since.

    None if the folder is not the root of a checkout, or git cannot read it.
    """
    if not (root / ".git").exists():  # a folder inside somebody else's checkout has that one's commit
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Inside a hook, variables such as GIT_DIR name the repository of that hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment | {"GIT_OPTIONAL_LOCKS": "0"})
    except OSError:
        return None
    return done.stdout.strip() or None
