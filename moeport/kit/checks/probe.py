"""The values of every collective, among all ranks and among groups of every second one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moeport.comm.check import check_collectives
from moeport.kit.result import Outcome, Result, judgement
from moeport.kit.task import Task
from moeport.pages.tables import Table


def work(task: Task) -> dict[str, Any]:
    """Compare every collective in every type; the first wrong value ends the process with its place."""
    with task.world(task.dtypes[0]) as (backend, communicator):
        types = [*task.dtypes, "index"]
        found = {"all": check_collectives(communicator, types, backend.value_and_grad)}
        if communicator.size >= 4:
            group = communicator.group([communicator.ranks[::2], communicator.ranks[1::2]])
            found["every second"] = check_collectives(group, types, backend.value_and_grad)
        return {
            "device": backend.device,
            "ranks": communicator.size,
            "collectives": [{"among": among, **asdict(each)} for among, some in found.items() for each in some],
        }


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if it has compared something, since a wrong value ends the process."""
    found = outcomes[0].value
    rows = [(each["collective"], each["dtype"], each["among"], "right") for each in found["collectives"]]
    summary = f"every value is right on {found['ranks']} ranks"
    table = Table.of("collectives", ("collective", "type", "ranks", "values"), rows)
    return judgement(False, len(rows), summary, tables=[table], data=found)
