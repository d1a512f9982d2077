"""Work in processes of its own, so that a kernel that breaks its device ends only that: on accelerators.

A process is given a job as JSON and writes its result to a file whenever there is more. The process that starts it
never touches the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAST_LINES = 3


class Process:
    """A job that runs.

    Args:
        script: Python file with a `--job FILE` option.
        job: what it is asked to do.
        folder: for job, result and output.
        name: of the files.
    """

    def __init__(self, script: Path, job: Mapping[str, Any], folder: Path, name: str):
        stem = "".join(letter if letter.isalnum() else "-" for letter in name)
        self.result_file, self.log_file = folder / f"{stem}.result.json", folder / f"{stem}.log"
        job_file = folder / f"{stem}.job.json"
        job_file.write_text(json.dumps({**job, "result": str(self.result_file)}), encoding="utf-8")
        self.result_file.unlink(missing_ok=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with self.log_file.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "--job", str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait(self, until: float) -> str | None:
        """Wait, at most until that time; then end it.

        Returns: why it did not end well; None if it did.
        """
        try:
            code = self.process.wait(max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "out of time"
        if code == 0:
            return None
        lines = [line.strip() for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit code {code}: {' | '.join(lines[-LAST_LINES:])[-300:]}"

    def result(self) -> dict[str, Any]:
        """The last result that was written; empty if there is none."""
        try:
            return dict(json.loads(self.result_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}


def write_whole(path: Path, value: object) -> None:
    """Write JSON so that whoever reads it sees the old or the new value."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)
