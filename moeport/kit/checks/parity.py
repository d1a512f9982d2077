"""This device against the recording that comes with moeport: layer by layer, with a verdict for every tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moeport.kit.reference import record_variant, reference
from moeport.kit.result import Outcome, Result
from moeport.kit.task import Task
from moeport.pages.tables import Table
from moeport.parity import text
from moeport.parity.compare import compare, routing_differs
from moeport.parity.result import Comparison, Report, worst

NAMES = {"float32": "fp32", "bfloat16": "bf16"}


def work(task: Task) -> dict[str, Any]:
    """Record this device in each type, compare with the CPU's float32, and judge by the CPU's float64."""
    kind = task.device if task.device != "auto" else task.open(task.dtypes[0]).device.partition(" ")[0]
    with reference() as bundles:
        found = {}
        for dtype in [dtype for dtype in task.dtypes if dtype in NAMES]:
            variant = f"{task.backend}-{kind}:{NAMES[dtype]}"
            found[dtype] = _described(_compare(bundles, variant))
    return found


def _compare(bundles: Any, variant: str) -> Comparison:
    a, golden = bundles["float32"], bundles["float64"]
    b = record_variant(variant)
    replayed = record_variant(variant, replay=a, steps=1) if routing_differs(a, b) else None
    return compare(a, b, golden=golden, replayed=replayed)


def _described(found: Comparison) -> dict[str, Any]:
    tables = [asdict(table) for table in text.tables(found)]
    return {
        "headline": found.headline,
        "verdict": found.verdict,
        "lines": text.lines(found),
        "tables": tables,
        "report": json.loads(Report(found.verdict, [found]).to_json()),
    }


def judge(outcomes: Sequence[Outcome]) -> Result:
    """The worst verdict of the comparisons; a warning says what was not judged."""
    found = outcomes[0].value
    if not found:
        return Result("warn", f"nothing was compared: the device computes neither in {' nor in '.join(NAMES)}")
    rows = [(dtype, each["verdict"], each["headline"]) for dtype, each in found.items()]
    tables = [Table.of("verdicts", ("type", "verdict", "what was found"), rows)]
    for dtype, each in found.items():
        tables += [Table.of(f"{dtype}: {t['title']}", t["header"], t["rows"]) for t in each["tables"]]
    files = {f"parity-{dtype}.json": each["report"] for dtype, each in found.items()}
    summary = "; ".join(f"{dtype}: {each['headline']}" for dtype, each in found.items())
    return Result(worst([each["verdict"] for each in found.values()]), summary, tables=tables, files=files)
