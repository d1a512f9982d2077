"""The device: its name, the compute types that a tiny model trains in, and the kernels of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeport.backends.examine import run_tiny_model
from moeport.core.ops import FLOAT_DTYPES
from moeport.facts import BACKENDS
from moeport.kit.result import Outcome, Result
from moeport.kit.task import Task, describe
from moeport.pages.tables import Table


def work(task: Task) -> dict[str, Any]:
    """What the backend says of its device, and what happens in each compute type."""
    found: dict[str, Any] = {"dtypes": {}, "kernels": {}, "problems": {}}
    for dtype in FLOAT_DTYPES:
        if dtype not in BACKENDS[task.backend].dtypes_on(task.device):
            continue
        try:
            backend = task.open(dtype)
            found |= {
                "device": backend.device,
                "kind": backend.device.partition(" ")[0],
                "versions": backend.versions(),
                "units": [{"name": name, "memory_bytes": memory} for name, memory in backend.accelerators()],
                "communication": backend.communication(),
            }
            run_tiny_model(backend)
            found["kernels"][dtype] = backend.kernel_choices()
        except Exception as error:
            found["problems"][dtype] = describe(error)
        found["dtypes"][dtype] = dtype not in found["problems"]
    return found


def usable(found: Any) -> tuple[str, ...]:
    """The compute types that work, the most common first."""
    order = ("float32", "bfloat16", "float64")
    return tuple(dtype for dtype in order if found and found["dtypes"].get(dtype))


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if a tiny model trains in some type."""
    found = outcomes[0].value
    types = usable(found)
    if not types:
        reasons = "; ".join(dict.fromkeys(found["problems"].values()))
        return Result("fail", f"cannot be used: {reasons}", data=found)
    units = [(unit["name"], _gib(unit["memory_bytes"])) for unit in found["units"]]
    rows = [(dtype, found["problems"].get(dtype, "usable")) for dtype in found["dtypes"]]
    kernels = [
        (kernel, *(found["kernels"][dtype][kernel] for dtype in types))
        for kernel in next(iter(found["kernels"].values()))
    ]
    tables = [Table.of("compute types", ("type", "result"), rows), Table.of("kernels", ("kernel", *types), kernels)]
    if units:
        tables.insert(0, Table.of("devices", ("name", "memory"), units))
    summary = f"{found['device']}: {', '.join(types)}"
    if found["problems"]:
        summary += f"; not {', '.join(found['problems'])}"
    return Result("pass", summary, [("devices", str(max(len(units), 1)), found["device"])], tables, found)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
