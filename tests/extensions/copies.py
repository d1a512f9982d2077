"""Copies of this repository to which an extension is added, so that the places it touches are counted for real."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PARTS = ("moeport", "tests", "configs", "docs", "README.md", "pyproject.toml", "mkdocs.yml")
"""What a copy holds: enough to run commands, tests and the generators of the documentation."""


@dataclass(frozen=True)
class Row:
    """Lines inserted into a file that exists."""

    file: str
    """Path from the root of the repository."""
    after: str
    """The line, found once in the file, after which the lines go; spaces around it do not count."""
    text: str


@dataclass(frozen=True)
class ExtendedCopy:
    """A copy of the repository with an extension in it."""

    root: Path
    places: int
    """Places that the extension touches: each new file, or new folder with all its files, and each inserted row."""

    def moeport(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `moeport` with arguments in the copy."""
        return self.python("-m", "moeport", *arguments, **environment)

    def pytest(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run tests of the copy."""
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the copy; its packages come before those installed."""
        own = {"PYTHONPATH": str(self.root), "COLUMNS": "200", "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )


def extended_copy(folder: Path, files: dict[str, str], rows: tuple[Row, ...] = ()) -> ExtendedCopy:
    """Copy the repository and extend the copy.

    Args:
        folder: an empty folder, such as `tmp_path`.
        files: new files, path from the root to content.
        rows: what is inserted into files that exist.

    Raises AssertionError where a new file exists already, or an anchor is not found exactly once.
    """
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    added = {_highest_new(folder, Path(file)) for file in files}
    for file, content in files.items():
        assert not (folder / file).exists(), f"{file} exists already"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
    for row in rows:
        _insert(folder / row.file, row)
    return ExtendedCopy(folder, len(added) + len(rows))


def _highest_new(folder: Path, file: Path) -> Path:
    """The file, or the folder furthest up that comes with it."""
    missing = [path for path in (file, *file.parents) if not (folder / path).exists()]
    return missing[-1] if missing else file


def _insert(path: Path, row: Row) -> None:
    lines = path.read_text().splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if line.strip() == row.after.strip()]
    assert len(found) == 1, f"{row.file}: the line {row.after!r} is there {len(found)} times; expected once"
    lines.insert(found[0] + 1, row.text if row.text.endswith("\n") else row.text + "\n")
    path.write_text("".join(lines))
