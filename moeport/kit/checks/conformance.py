"""Every operation against its formula in plain numpy, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeport.backends.base import Backend
from moeport.conformance.case import Case
from moeport.conformance.check import CASES, Finding, check_gradients, check_values
from moeport.core.ops import Ops
from moeport.kit.result import Outcome, Result, judgement
from moeport.kit.task import Task, describe
from moeport.pages.tables import Table


def work(task: Task) -> dict[str, Any]:
    """Every case in every type and every form of the operations, each noted as soon as it is known."""
    types = [dtype for dtype in task.dtypes if dtype != "float64" or not task.quick] or list(task.dtypes)
    cases: dict[str, tuple[Case, Backend, Ops]] = {}
    for dtype in types:
        backend = task.open(dtype)
        for form, ops in backend.forms().items():
            for case in CASES:
                if case.float64 and "float64" not in task.dtypes:
                    continue
                cases[f"{dtype} {form} {case}"] = (case, backend, ops)
    for label in task.remaining(list(cases)):
        case, backend, ops = cases[label]
        with task.case(label) as found:
            found |= {"op": case.op, "dtype": backend.dtype, "values": _found(check_values, case, backend, ops)}
            if case.variables:
                found["gradients"] = _found(check_gradients, case, backend, ops)
    return {"cases": len(cases)}


def _found(check: Any, case: Case, backend: Backend, ops: Ops) -> dict[str, Any]:
    """How near the limit, and what is wrong; an error counts as wrong."""
    try:
        finding: Finding = check(case, backend, ops)
    except Exception as error:
        return {"nearness": None, "problem": describe(error)}
    nearness = finding.nearness if finding.problem is None else None
    return {"nearness": nearness, "problem": finding.problem}


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if every case was examined, none is wrong and none has ended its process."""
    outcome = outcomes[0]
    done = outcome.done
    wrong = [
        (event["end"], direction, event[direction]["problem"])
        for event in done
        for direction in ("values", "gradients")
        if direction in event and event[direction]["problem"]
    ]
    wrong += [(crash.label, "process", crash.ending) for crash in outcome.crashes]
    checks = sum(("values" in event) + ("gradients" in event) for event in done)
    failed = len({label for label, _, _ in wrong})
    summary = f"{checks:,} checks of {len(done):,} cases are right"
    if wrong:
        summary = f"{failed} of {outcome.reached:,} cases are wrong, the first {wrong[0][0]}: {wrong[0][2]}"
    tables = [Table.of("what is wrong", ("case", "of", "what"), wrong)] if wrong else []
    tables.append(_by_operation(done))
    files = {"conformance.json": {"cases": done, "crashes": [vars(crash) for crash in outcome.crashes]}}
    figures = [("cases", f"{len(done):,}", f"{checks:,} checks"), ("wrong", str(failed), "")]
    return judgement(
        bool(wrong),
        outcome.reached,
        summary,
        outcome.expected,
        figures=figures,
        tables=tables,
        data={"checks": checks, "wrong": wrong},
        files=files,
    )


def _by_operation(done: Sequence[Mapping[str, Any]]) -> Table:
    """For each operation and type, how near the worst result is to its limit."""
    dtypes = list(dict.fromkeys(event["dtype"] for event in done))
    operations = list(dict.fromkeys(event["op"] for event in done))
    rows = []
    for op in operations:
        row = [op, str(sum(event["op"] == op for event in done))]
        for dtype in dtypes:
            for direction in ("values", "gradients"):
                found = [e[direction] for e in done if (e["op"], e["dtype"]) == (op, dtype) and direction in e]
                row.append(_worst(found))
        rows.append(row)
    header = ["operation", "cases"] + [f"{dtype}, {what}" for dtype in dtypes for what in ("values", "gradients")]
    return Table("the worst result of each operation, as a share of its limit", header, rows)


def _worst(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "—"
    if any(each["problem"] for each in found):
        return "wrong"
    return f"{max(each['nearness'] for each in found):.2f}"
