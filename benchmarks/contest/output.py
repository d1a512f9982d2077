"""Results of a contest as a table, and as bars and curves in an SVG that needs no library."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from contest.ours import product_flops
from contest.shapes import Shape

MIB = 2**20
COLOURS = {"ours": "#3949ab", "peer": "#9e9e9e", "limit": "#d7ccc8"}
LINES = ("#3949ab", "#e65100", "#2e7d32", "#6a1b9a", "#00838f", "#ad1457", "#9e9d24", "#4e342e")


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the quartiles around it."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def ratio(row: Mapping[str, Any], other: Mapping[str, Any], key: str = "both_ms") -> float | None:
    """Median over rounds of a row's time over that of another in the same round; None if either has none."""
    pairs = list(zip(row.get(key, []), other.get(key, []), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def rate(shape: Shape, row: Mapping[str, Any], key: str = "both_ms") -> float | None:
    """TFLOP/s of the experts' products by the median time."""
    values = row.get(key)
    return shape.flops(key == "both_ms") / statistics.median(values) / 1e9 if values else None


def table(found: Mapping[str, Any]) -> str:
    """All cells as Markdown tables, and who is missing in them."""
    terms = found["terms"]
    parts = [f"{machine_line(found['machine'])}; {terms['dtype']}"]
    for cell in found["cells"]:
        parts.append(_cell_table(cell, found))
    absent = [f"- {name}: {check['reason']}" for name, check in found["checks"].items() if "reason" in check]
    if absent:
        parts.append("Not timed:\n\n" + "\n".join(absent))
    parts.append(
        "Times are medians of rounds (quartiles in parentheses); x dense: median of the ratios to the dense MLP in the "
        "same round; held: between forward and backward, the tokens included, weights not; peak: growth of the "
        "allocated memory; waits: of the host for the device in one forward and backward pass (on a CPU, operations "
        "that would wait); error: the worst relative error against float32."
    )
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line on where it was measured."""
    what = machine.get("name") or machine.get("processor") or machine["device"]
    threads = f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}" if "threads" in machine else ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{what}{threads}; {versions}; {machine['date']}"


def place(machine: Mapping[str, Any]) -> str:
    """Where it was measured, in a few words."""
    what = machine.get("name") or machine.get("processor") or machine["device"]
    return f"{what}, torch {machine['versions'].get('torch')}, {machine['date']}"


def _cell_table(cell: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    shape = Shape(**cell["shape"])
    held = shape.least_held(2 if found["terms"]["dtype"] == "bfloat16" else 4)
    busiest = f", busiest expert {cell['busiest']:.1f} times the mean" if "busiest" in cell else ""
    lines = [
        f"**{shape.label}**: {shape.tokens:,} tokens of {shape.width}, {shape.experts} experts of {shape.hidden}, "
        f"top-{shape.top_k}{busiest}; least held {held / MIB:.1f} MiB"
        + (f"; {cell['reason']}" if "reason" in cell else ""),
        "",
        "| | forward, ms | forward and backward, ms | TFLOP/s | x dense | held, MiB | peak, MiB | waits | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    dense = cell["rows"].get("dense MLP", {})
    for name, row in cell["rows"].items():
        check = found["checks"].get(name, {})
        error = "-" if row["group"] == "limit" else check.get("differs") or _number(check.get("error"), "{:.0e}")
        if "reason" in row:
            lines.append(f"| {name} | {row['reason']} | | | | | | | |")
            continue
        of = product_flops(found["machine"]["device"]) / 1e9 if name == "large product" else None
        speed = of / statistics.median(row["forward_ms"]) if of and row["forward_ms"] else rate(shape, row)
        times = [_times(row[key]) for key in ("forward_ms", "both_ms")]
        cells = [
            *times,
            _number(speed, "{:.3g}"),
            _number(ratio(row, dense), "{:.2f}"),
            _number(row.get("held"), "{:.1f}", MIB),
            _number(row.get("peak"), "{:.1f}", MIB),
            _number(row.get("waits"), "{}"),
            error,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(values: Sequence[float]) -> str:
    if not values:
        return "-"
    median, low, high = summary(values)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value / unit if unit != 1 else value)


def bars(found: Mapping[str, Any]) -> str:
    """TFLOP/s forward and backward, a bar per contender, the shapes below each other."""
    height, marks = 20, []
    y = 24
    for cell in found["cells"]:
        shape = Shape(**cell["shape"])
        speeds = {name: rate(shape, row) for name, row in cell["rows"].items()}
        most = max((speed for speed in speeds.values() if speed), default=None)
        if most is None:
            continue
        marks.append(f'<text x="8" y="{y}" font-weight="bold">{escape(shape.label)}</text>')
        for name, speed in speeds.items():
            if speed:
                y += height
                colour = COLOURS[cell["rows"][name]["group"]]
                marks.append(f'<text x="232" y="{y}" text-anchor="end">{escape(name)}</text>')
                marks.append(
                    f'<rect x="240" y="{y - 12}" width="{400 * speed / most:.1f}" height="14" fill="{colour}"/>'
                )
                marks.append(f'<text x="{246 + 400 * speed / most:.1f}" y="{y}">{speed:.3g}</text>')
        y += 36
    return _svg(720, y, f"TFLOP/s forward and backward; {place(found['machine'])}", marks)


def curves(found: Mapping[str, Any], size: str) -> str:
    """Time forward and backward over a size, both logarithmic, a line per contender."""
    import math

    points: dict[str, list[tuple[float, float]]] = {}
    for cell in found["cells"]:
        for name, row in cell["rows"].items():
            if row["both_ms"]:
                points.setdefault(name, []).append((cell["shape"][size], statistics.median(row["both_ms"])))
    logs = [(math.log(x), math.log(y)) for line in points.values() for x, y in line]
    if not logs:
        return _svg(720, 60, "nothing was timed", [])
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*logs, strict=True))

    def point(x: float, y: float) -> tuple[float, float]:
        return 60 + 420 * (math.log(x) - x0) / (x1 - x0 or 1), 300 - 260 * (math.log(y) - y0) / (y1 - y0 or 1)

    marks = [f'<text x="270" y="340" text-anchor="middle">{escape(size)}</text>']
    for x in sorted({x for line in points.values() for x, _ in line}):
        marks.append(f'<text x="{point(x, math.exp(y0))[0]:.1f}" y="320" text-anchor="middle">{x:g}</text>')
    for y in (math.exp(y0), math.exp(y1)):
        marks.append(f'<text x="54" y="{point(math.exp(x0), y)[1]:.1f}" text-anchor="end">{y:.3g}</text>')
    for index, (name, line) in enumerate(points.items()):
        colour = LINES[index % len(LINES)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (point(x, y) for x, y in sorted(line)))
        dashes = "" if index < len(LINES) else ' stroke-dasharray="6 3"'
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        marks.append(f'<path d="M500 {40 + 18 * index}h24" stroke="{colour}" stroke-width="2"{dashes}/>')
        marks.append(f'<text x="530" y="{44 + 18 * index}">{escape(name)}</text>')
    height = max(350, 60 + 18 * len(points))
    return _svg(760, height, f"ms forward and backward; {place(found['machine'])}", marks)


def _svg(width: float, height: float, title: str, marks: Sequence[str]) -> str:
    """The picture, with its title below it in small letters."""
    marks = [*marks, f'<text x="8" y="{height + 12:g}" font-size="9">{escape(title)}</text>']
    height += 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(marks)}</svg>\n'
    )
