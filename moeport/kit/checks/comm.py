"""The speed of collectives and of expert exchanges, whose values are checked too."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeport.bench.comm import bench_comm
from moeport.bench.options import CommOptions, Files, Runs, Sizes, Target, Tokens, Variants
from moeport.kit.result import Outcome, Result
from moeport.kit.task import COLLECTIVE_SECONDS, Task
from moeport.launch.launcher import launched
from moeport.pages.tables import Table

FILE = "comm.json"


def work(task: Task) -> Any:
    """What `moeport bench comm` finds."""
    options = CommOptions(
        operations=[],
        sizes=Sizes("64K", "1M", factor=16) if task.quick else Sizes("64K", "64M", factor=8),
        runs=Runs(repetitions=3, warmup=1) if task.quick else Runs(),
        dtype=task.dtypes[0],
        variants=Variants(),
        tokens=Tokens(experts=math.lcm(task.ranks, 8), top_k=2),
        chunks="1",
        target=Target(task.backend, task.device, COLLECTIVE_SECONDS),
        files=Files(json_file=Path(task.folder, FILE)),
    )
    bench_comm(options)
    launch = launched()
    return json.loads(Path(task.folder, FILE).read_text()) if launch is None or launch.rank == 0 else None


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if every value is right."""
    found = outcomes[0].value
    rows = [
        (row["operation"], f"{row['size']:,}", f"{row['time_us']:,.0f}", f"{row['busbw']:.3f}", row["wrong"])
        for row in found["rows"]
    ]
    wrong = sum(row["wrong"] for row in found["rows"])
    best = max(found["rows"], key=lambda row: row["busbw"])
    summary = f"up to {best['busbw']:.3g} GB/s of bus bandwidth ({best['operation']}) on {found['ranks']} ranks"
    if wrong:
        summary = f"{wrong:,} values are wrong on {found['ranks']} ranks"
    return Result(
        "fail" if wrong else "pass",
        summary,
        [("best bus bandwidth", f"{best['busbw']:.3g} GB/s", best["operation"])],
        [Table.of("times", ("operation", "bytes", "µs", "busbw, GB/s", "wrong"), rows)],
        files={FILE: found},
    )
