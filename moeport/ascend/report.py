"""The part of `moeport doctor` that is about Ascend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.text import Text

from moeport.ascend.checks import findings
from moeport.ascend.installed import Machine, machine

STYLES = {"wrong": "red", "doubtful": "yellow"}


def report(found: Machine | None = None) -> dict[str, Any]:
    """What of Ascend is on this machine, and what does not fit, as JSON-able values.

    Args:
        found: the machine; None: look.
    """
    found = found or machine()
    return {"present": found.is_ascend, **found.as_json(), "findings": [asdict(each) for each in findings(found)]}


def lines(found: Mapping[str, Any]) -> Iterator[Text]:
    """A report for a terminal; no lines on a machine without Ascend where nothing is wrong."""
    if not found["present"] and not found["findings"]:
        return
    yield Text("Ascend", style="bold")
    for line in _versions(found):
        yield Text(f"  {line}")
    for name, value in found["environment"].items():
        yield Text(f"  {name}={_short(value)}")
    for each in found["findings"]:
        text = Text("  ")
        text.append(each["severity"], style=STYLES[each["severity"]])
        text.append(f": {each['subject']}: {each['problem']}; {each['mend']}")
        yield text


def _versions(found: Mapping[str, Any]) -> Iterator[str]:
    for cann in found["cann"] or [None]:
        if cann is None:
            yield "CANN: not found"
        else:
            by = f"named by {cann['named_by']}" if cann["named_by"] else "not in effect"
            yield f"CANN {cann['version'] or 'of unknown version'} in {cann['folder']}, {by}"
    yield f"driver {found['driver'] or 'not found'}, firmware {found['firmware'] or 'not found'}"
    smi = found["smi"]
    if smi is None:
        yield "npu-smi: not found"
    else:
        chips = ", ".join(f"{name} ({health})" for name, health in smi["chips"]) or "lists no NPU"
        version = f" {smi['version']}" if smi["version"] else ""
        yield f"npu-smi{version}: {smi['problem'] or chips}"
    yield f"NPUs that the system lists: {len(found['devices']) or 'none'}"
    known = (f"{name} {version}" for name, version in found["packages"].items())
    yield "packages: " + (", ".join(known) or "none of torch, torch-npu and mindspore")


def _short(value: str) -> str:
    """A value on one line; long lists of folders are cut."""
    text = " ".join(value.split())
    return text if len(text) <= 100 else f"{text[:100]}..."
