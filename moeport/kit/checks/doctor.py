"""What is installed and what works, without what names the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeport.backends.doctor import report
from moeport.kit.result import Outcome, Result
from moeport.kit.task import Task
from moeport.pages.tables import Table

KEPT = ("moeport", "commit", "platform", "cpu", "accelerators_seen", "backends", "packages")
"""Keys of the doctor's report that describe no more than kind and state of the machine."""


def work(task: Task) -> dict[str, Any]:
    """The report, without host, addresses and paths."""
    found = report()
    kept = {key: value for key, value in found.items() if key in KEPT}
    kept["python"] = found["python"]["version"]
    kept["cpu"] = {key: value for key, value in found["cpu"].items() if key != "settings"}
    network = found["network"]
    kept["network"] = {
        "mbit_per_second": sorted({each["mbit_per_second"] for each in network["interfaces"]} - {None}),
        "launchers": sorted(name for name, path in network["launchers"].items() if path),
    }
    ascend = found["ascend"]
    kept["ascend"] = {key: ascend[key] for key in ("driver", "firmware", "smi", "packages", "torch_cuda", "findings")}
    kept["ascend"]["cann"] = [each["version"] for each in ascend["cann"]]
    kept["backend"] = task.backend
    return kept


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if the backend in question works."""
    found = outcomes[0].value
    backend = found["backends"][found["backend"]]
    rows = [
        (name, entry["version"] or "—", "works" if _works(entry) else entry["problem"] or "not installed")
        for name, entry in {**found["backends"], **found["packages"]}.items()
    ]
    wrong = [f"{each['subject']}: {each['problem']}; {each['mend']}" for each in found["ascend"]["findings"]]
    summary = f"{found['backend']} {backend['version']} works"
    if not _works(backend):
        summary = f"{found['backend']}: {backend['problem'] or 'not installed'}"
    return Result(
        "pass" if _works(backend) else "fail",
        summary,
        figures=[("accelerators seen", str(len(found["accelerators_seen"])), ", ".join(found["accelerators_seen"]))],
        tables=[
            Table.of("packages", ("package", "version", "state"), rows),
            *([Table.of("what does not fit", ("finding",), [(each,) for each in wrong])] if wrong else []),
        ],
        data=found,
    )


def _works(entry: Mapping[str, Any]) -> bool:
    return bool(entry["installed"]) and entry["problem"] is None
