"""A process of a part: computes, and leaves what it finds in the folder of its task."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moeport.kit.parts import PARTS
from moeport.kit.task import VALUE_FILE, Task
from moeport.launch.launcher import launched


def run_task(folder: Path) -> None:
    """Run the task that was written to a folder."""
    task = Task.read(folder)
    os.chdir(folder)
    part = next(part for part in PARTS if part.name == task.part)
    value = part.module().work(task)
    launch = launched()
    if launch is None or launch.rank == 0:
        temporary = folder / f"{VALUE_FILE}.part"
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(folder / VALUE_FILE)
