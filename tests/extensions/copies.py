"""Copies of this repository with an extension added, to count the places that it really touches."""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moeport.launch.launcher import node_processes
from tests.jobs.ports import free_port
from tests.jobs.ranks import Forker, Ranks, settings

REPOSITORY = Path(__file__).parents[2]
PARTS = ("moeport", "tests", "configs", "docs", "examples", "README.md", "pyproject.toml", "mkdocs.yml")
"""Contents of a copy: enough to run commands, tests and the generators of the documentation."""


@dataclass(frozen=True)
class Row:
    """Lines inserted into an existing file."""

    file: str
    """Path relative to the root of the repository."""
    after: str
    """The line to insert after, which must occur once in the file; spaces around it are ignored."""
    text: str


@dataclass(frozen=True)
class ExtendedCopy:
    """A copy of the repository that contains an extension."""

    root: Path
    places: int
    """Places that the extension touches: each new file, or new folder with all its files, and each file that gets rows,
    so that an entry of a table and the import it needs are one place."""

    def moeport(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `moeport` with arguments in the copy."""
        return self.python("-m", "moeport", *arguments, **environment)

    def pytest(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run tests of the copy."""
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)

    def with_torch(self, *arguments: str, ranks: int = 1) -> tuple[list[int], str]:
        """Run `moeport` with arguments in the copy, in ranks forked from a process that has imported torch alone.

        Returns: exit codes, and what was written to stdout and stderr.
        """
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            job = node_processes("torchrun", 1, ranks, "127.0.0.1", [], free_port())
            environments = [dict(process.environment) for process in job]
        logs = [self.root / f"rank-{number}.log" for number in range(ranks)]
        own = settings() | {"PYTHONPATH": str(self.root), "NO_COLOR": "1"}
        started = Ranks(
            [
                _torch().start(["-m", "moeport", *arguments], own | environment, log, self.root)
                for environment, log in zip(environments, logs, strict=True)
            ]
        )
        try:
            return [rank.wait(240) for rank in started.ranks], "".join(log.read_text() for log in logs)
        finally:
            started.kill()

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the copy; its packages take precedence over installed ones."""
        own = {"PYTHONPATH": str(self.root), "COLUMNS": "200", "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )


@functools.cache
def _torch() -> Forker:
    """Forks find the packages of their working folder first, since nothing of moeport is imported yet."""
    return Forker(("torch", "torch.distributed", "torch._inductor"), settings())


def extended_copy(folder: Path, files: dict[str, str], rows: tuple[Row, ...] = ()) -> ExtendedCopy:
    """Copy the repository and extend the copy.

    Args:
        folder: an empty folder, such as `tmp_path`.
        files: content of new files, by path relative to the root.
        rows: lines to insert into existing files.

    Raises AssertionError if a new file already exists, or if an anchor does not occur exactly once.
    """
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, folder / part)  # with the bytecode, which its processes then need not compile
        else:
            shutil.copy(source, folder / part)
    added = {_highest_new(folder, Path(file)) for file in files}
    for file, content in files.items():
        assert not (folder / file).exists(), f"{file} already exists"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
    for row in rows:
        _insert(folder / row.file, row)
    return ExtendedCopy(folder, len(added) + len({row.file for row in rows}))


def _highest_new(folder: Path, file: Path) -> Path:
    """The file, or the topmost new folder that contains it."""
    missing = [path for path in (file, *file.parents) if not (folder / path).exists()]
    return missing[-1] if missing else file


def _insert(path: Path, row: Row) -> None:
    lines = path.read_text().splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if line.strip() == row.after.strip()]
    assert len(found) == 1, f"{row.file}: the line {row.after!r} occurs {len(found)} times; expected once"
    lines.insert(found[0] + 1, row.text if row.text.endswith("\n") else row.text + "\n")
    path.write_text("".join(lines))
