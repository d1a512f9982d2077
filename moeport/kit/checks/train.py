"""A short training, alone and on all ranks with the experts divided among them: both must go the same way."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeport.config import config_from_dict
from moeport.kit.corpus import training
from moeport.kit.result import Outcome, Result
from moeport.kit.task import Task
from moeport.pages.console import PlainConsole
from moeport.pages.tables import Table
from moeport.training.run import train
from moeport.training.run_dir import METRICS_FILE
from moeport.training.summary import RunSummary

SAME_STEPS, SAME = 3, {"float64": 1e-6, "float32": 1e-3, "bfloat16": 3e-2}
"""Steps whose losses must be alike on one rank and on several, and by how much they may differ, relative."""
FALLS = 0.5
"""Nats by which the loss must fall."""


def work(task: Task) -> dict[str, Any]:
    """Losses, and tokens per second, by type: several ranks meet once, so they train in the first one alone."""
    types = [dtype for dtype in task.dtypes if dtype != "float64"] or task.dtypes
    return {dtype: _train(task, dtype) for dtype in types[: 1 if task.ranks > 1 else 2]}


def _train(task: Task, dtype: str) -> dict[str, Any]:
    """The same model and batches on any number of ranks."""
    values = training(
        run={"dir": f"run-{dtype}"},
        backend={"name": task.backend, "device": task.device, "dtype": dtype},
        parallelism={"expert": task.ranks},
    )
    values["training"] |= {"steps": 10 if task.quick else 100, "batch_size": math.lcm(8, task.all_ranks)}
    values["model"]["moe"]["num_experts"] = math.lcm(8, task.all_ranks)
    summary = train(config_from_dict(values), console=PlainConsole(force_terminal=False))
    if not isinstance(summary, RunSummary):
        return {}
    lines = Path(f"run-{dtype}", METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return {
        "losses": [record["loss"] for record in map(json.loads, lines) if "loss" in record],
        "validation_loss": summary.val_loss,
        "tokens_per_second": summary.tokens_per_second,
        "device": summary.device,
        "ranks": task.ranks,
    }


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if the loss falls, and on several ranks as on one."""
    alone, *several = (outcome.value for outcome in outcomes)
    rows, problems = [], []
    for found in (alone, *several):
        for dtype, run in found.items():
            losses = run["losses"]
            if not losses[-1] < losses[0] - FALLS:
                problems.append(f"{dtype} on {_ranks(run)}: the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}")
            apart = _apart(alone[dtype]["losses"], losses)
            if not all(x <= SAME[dtype] for x in apart[:SAME_STEPS]):
                problems.append(
                    f"{dtype} on {_ranks(run)}: the losses of the first {SAME_STEPS} steps are up to "
                    f"{max(apart[:SAME_STEPS]):.1e} from those of one rank, limit {SAME[dtype]:g}"
                )
            speed = f"{run['tokens_per_second']:,.0f}" if run["tokens_per_second"] else "—"
            rows.append((dtype, run["ranks"], f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{max(apart):.1e}", speed))
    run = alone[next(iter(alone))]
    summary = f"the loss falls from {run['losses'][0]:.3f} to {run['losses'][-1]:.3f} in {len(run['losses'])} steps"
    if several:
        summary += f", and alike on {several[0][next(iter(alone))]['ranks']} ranks"
    header = ("type", "ranks", "first loss", "last loss", "largest difference to one rank", "tokens/s")
    table = Table.of("trainings", header, rows)
    return Result(
        "fail" if problems else "pass", "; ".join(problems) or summary, tables=[table], data=[alone, *several]
    )


def _ranks(run: dict[str, Any]) -> str:
    return f"{run['ranks']} rank{'s'[: run['ranks'] > 1]}"


def _apart(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(x - y) / abs(x) for x, y in zip(a, b, strict=True)]
