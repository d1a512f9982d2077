"""What the layer and the step should reach on one H100 or H200 in bfloat16, and whether they do."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contest.output import ratio
from contest.shapes import Shape

DENSE, PEER, HELD, ZIPF = 0.85, 1.05, 1.05, 1.1
MFU, QUICKSTART = 0.40, 175_000
OURS = "moeport"


@dataclass(frozen=True)
class Verdict:
    """One target."""

    target: str
    wanted: str
    measured: str
    word: str
    """MET, MISSED or NOT MEASURED."""

    def as_dict(self) -> dict[str, str]:
        """Its fields."""
        return asdict(self)


def judged(
    target: str, wanted: str, value: float | None, is_met: Callable[[float], bool], form: str = "{:.2f}"
) -> Verdict:
    """The verdict on a value; None: it was not measured."""
    if value is None:
        return Verdict(target, wanted, "-", "NOT MEASURED")
    return Verdict(target, wanted, form.format(value), "MET" if is_met(value) else "MISSED")


def verdicts(out: Path) -> list[Verdict]:
    """All targets by the files of a session's folder."""
    layer, step, quick = (_read(out / path) for path in ("layer/layer.json", "step/step.json", "quickstart/step.json"))
    return [*_of_layers(layer), *_of_steps(step), *_of_quickstart(quick, _read(out / "quickstart/run/summary.json"))]


def _of_layers(found: Mapping[str, Any]) -> Iterator[Verdict]:
    cells = {Shape(**cell["shape"]).label: cell for cell in found.get("cells", []) if OURS in cell.get("rows", {})}
    if not cells:
        yield Verdict("layer", "all shapes", "-", "NOT MEASURED")
    for label, cell in cells.items():
        shape, rows = Shape(**cell["shape"]), cell["rows"]
        ours = rows[OURS]
        even = cells.get(shape.name)
        if shape.zipf:
            yield judged(f"{label}: time over even loads", f"at most {ZIPF}", _medians(ours, even), lambda x: x <= ZIPF)
            continue
        share = _inverse(ratio(ours, rows.get("dense MLP", {})))
        yield judged(f"{label}: of the dense MLP's rate", f"at least {DENSE}", share, lambda x: x >= DENSE)
        name, faster = best_peer(rows)
        label_of_peer = f"{label}: times the best peer{f' ({name})' if name else ''}"
        yield judged(label_of_peer, f"at least {PEER}", faster, lambda x: x >= PEER)
        item = 2 if found["terms"]["dtype"] == "bfloat16" else 4
        held = ours["held"] / shape.least_held(item) if "held" in ours else None
        yield judged(f"{label}: held over the least", f"at most {HELD}", held, lambda x: x <= HELD)
        waits = ours.get("waits")
        yield judged(f"{label}: waits of the host", "0", waits, lambda x: x == 0, "{:.0f}")


def best_peer(rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, float | None]:
    """The fastest peer that was timed, and its time over ours."""
    times = {
        name: ratio(row, rows[OURS]) for name, row in rows.items() if row["group"] == "peer" and "reason" not in row
    }
    timed = {name: value for name, value in times.items() if value is not None}
    name = min(timed, key=lambda each: timed[each], default="")
    return name, timed.get(name)


def _of_steps(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for cell in found.get("cells", []):
        row = cell.get("rows", {}).get(OURS, {})
        name = cell["name"]
        yield judged(f"{name}: MFU", f"at least {MFU:.0%}", row.get("mfu"), lambda x: x >= MFU, "{:.1%}")
    if not found:
        yield Verdict("step: MFU", f"at least {MFU:.0%}", "-", "NOT MEASURED")


def _of_quickstart(step: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[Verdict]:
    row = step["cells"][0].get("rows", {}).get(OURS, {}) if step.get("cells") else {}
    for what, value in (("a step", row.get("tokens_per_s")), ("moeport train", summary.get("tokens_per_second"))):
        wanted = f"at least {QUICKSTART:,}"
        yield judged(f"quickstart, {what}: tokens/s", wanted, value, lambda x: x >= QUICKSTART, "{:,.0f}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _medians(row: Mapping[str, Any], even: Mapping[str, Any] | None) -> float | None:
    """Median time of a row over that of ours in another cell."""
    if even is None or not row.get("both_ms") or not even["rows"][OURS].get("both_ms"):
        return None
    return statistics.median(row["both_ms"]) / statistics.median(even["rows"][OURS]["both_ms"])
