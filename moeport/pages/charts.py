"""Line charts and heat maps, computed as numbers, paths and images for a template to place on a page.

A chart measures SIZE by SIZE units with y pointing down, and is stretched to fit; labels are placed in percent.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SIZE = 1000
MARKED_POINTS = 40
"""Lines with at most this many points have a mark on each, and are not smoothed."""
LABEL_PERCENT = 7.0
"""Distance of labels beside a plot, in percent of its height."""
MARK_PERCENT = 18.0
"""Distance of labels in a row above a plot, in percent of its width."""


@dataclass(frozen=True)
class Series:
    """One line to draw."""

    label: str
    x: np.ndarray
    """Steps (points,)."""
    y: np.ndarray
    """Values (points,); NaN where there is no value."""
    points: Sequence[str]
    """A label for each x."""
    low: np.ndarray | None = None
    """Lower edge of the band around the line."""
    high: np.ndarray | None = None
    """Upper edge of the band."""


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart."""

    label: str
    value: str
    percent: float
    own: bool = False
    """Whether it represents this run."""


@dataclass(frozen=True)
class Axis:
    """How values are drawn and formatted."""

    title: str
    unit: str = ""
    show: str = "{:.4g}"
    """Format of a single value."""
    percent: bool = False
    """Whether values are fractions, shown in percent."""
    from_zero: bool = False
    """Whether the axis starts at 0."""
    logarithmic: bool = False
    """Whether the axis becomes logarithmic when values span a factor of 10."""
    references: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines by label."""
    smooth: bool = False
    """Whether lines with many points are drawn smoothed over the faint original."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """Vertical lines by label."""


@dataclass(frozen=True)
class Tick:
    """A label on an axis."""

    percent: float
    """Position from the left or the top."""
    label: str


@dataclass(frozen=True)
class Reference(Tick):
    """A horizontal line, and its label beside the plot."""

    label_percent: float
    """Position of the label from the top, at a distance from the others."""


@dataclass(frozen=True)
class Mark(Tick):
    """A vertical line, and its label above the plot."""

    row: int
    """Row of the label, counted upwards from the plot, so that no label covers another."""


@dataclass(frozen=True)
class Line:
    """A drawn line: its SVG paths and the text shown under the pointer."""

    label: str
    path: str
    smooth: str
    """Moving average of the line; empty if it is not smoothed."""
    band: str
    marks: str
    hover: Mapping[str, Sequence[float | str]]
    """`x` in chart units; `points` and `values` as text."""


@dataclass(frozen=True)
class LineChart:
    """A drawn line chart."""

    axis: Axis
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    references: Sequence[Reference]
    marks: Sequence[Mark]
    last: str
    """Describes the last point of each line."""


@dataclass(frozen=True)
class HeatMap:
    """A drawn heat map."""

    image: str
    """Data URL of a PNG with one pixel per cell."""
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


def line_chart(axis: Axis, series: Sequence[Series], last_step: float, whole: bool = True) -> LineChart | None:
    """Draws lines over steps 0 to `last_step`; None if no series has a finite value.

    `whole`: whether only whole numbers are marked on the axis of the steps, which may be of another quantity.
    """
    series = [one for one in series if np.isfinite(one.y).any()]
    if not series:
        return None
    parts = [part for one in series for part in (one.y, one.low, one.high) if part is not None]
    values = np.concatenate([*parts, np.array([*axis.references.values()])])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    logarithmic = axis.logarithmic and low > 0 and high >= 10 * low
    if logarithmic:
        low, high = low / 1.15, high * 1.15
        ticks = _logarithmic_ticks(low, high)
    else:
        low = min(low, 0.0) if axis.from_zero else low
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low if axis.from_zero and low == 0 else low - margin, high + margin
        ticks = linear_ticks(low, high, axis.percent)

    def to_y(value: np.ndarray) -> np.ndarray:
        if logarithmic:
            return SIZE - units(np.log(value), math.log(low), math.log(high))
        return SIZE - units(value, low, high)

    def height(value: float) -> float:
        return round(float(to_y(np.array(value))) * 100 / SIZE, 2)

    lines = []
    for one in series:
        x, y, seen = units(one.x, 0, last_step), to_y(one.y), np.isfinite(one.y)
        hover = {
            "x": x[seen].round(1).tolist(),
            "points": [point for point, finite in zip(one.points, seen, strict=True) if finite],
            "values": [axis.show.format(value) for value in one.y[seen]],
        }
        band = _band(x, to_y(one.low), to_y(one.high)) if one.low is not None and one.high is not None else ""
        marks = _marks(x, y) if seen.sum() <= MARKED_POINTS else ""
        smooth = _path(x, to_y(_smoothed(one.y))) if axis.smooth and len(x) > MARKED_POINTS else ""
        lines.append(Line(one.label, _path(x, y), smooth, band, marks, hover))
    return LineChart(
        axis,
        lines,
        _step_ticks(last_step, whole),
        [Tick(height(value), label) for value, label in ticks.items()],
        _references({label: height(value) for label, value in axis.references.items()}),
        _marked({label: value * 100 / last_step for label, value in axis.marks.items()}),
        ", ".join(_last(line, named=len(lines) > 1) for line in lines),
    )


def heat_map(ratio_EB: np.ndarray, last_step: int) -> HeatMap:
    """Draws the load of each expert, as a multiple of an even share, over ranges of steps.

    0 is opaque blue, 1 is transparent, and 2 or more is opaque orange.

    Args:
        ratio_EB: one row per expert, one column per range of steps.
        last_step: step at the right edge.
    """
    num_experts = len(ratio_EB)
    return HeatMap(
        "data:image/png;base64," + base64.b64encode(_png(ratio_EB)).decode(),
        _step_ticks(last_step),
        [
            Tick(round((expert + 0.5) * 100 / num_experts, 2), str(expert))
            for expert in range(0, num_experts, max(1, math.ceil(num_experts / 8)))
        ],
    )


def number(value: float, resolution: float) -> str:
    """`value` with as many decimals as `resolution` needs; thousands are written as k, millions as M."""
    if value == 0:
        return "0"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and resolution >= size / 1000:
            text = number(value / size, resolution / size)
            return (text.rstrip("0").rstrip(".") if "." in text else text) + suffix
    if resolution < 1e-4:
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:.{max(0, -math.floor(math.log10(resolution) + 1e-9))}f}"


def _last(line: Line, named: bool) -> str:
    return f"{line.hover['points'][-1]}: {f'{line.label} ' if named else ''}{line.hover['values'][-1]}"


def units(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where values stand on an axis from `low` to `high`, in chart units."""
    return (value - low) * (SIZE / (high - low))


def linear_ticks(low: float, high: float, percent: bool = False) -> dict[float, str]:
    """About five round values from `low` to `high`, and their labels."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    if percent:
        return {value: number(value * 100, step * 100) + "%" for value in values}
    return {value: number(value, step) for value in values}


def _logarithmic_ticks(low: float, high: float) -> dict[float, str]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 100 * low else (1,)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return {value: number(value, value) for value in values if low <= value <= high}


def _step_ticks(last_step: float, whole: bool = True) -> list[Tick]:
    ticks = linear_ticks(0, last_step)
    if whole:
        apart = max([1.0, *list(ticks)[1:2]])
        ticks = {step: number(step, apart) for step in ticks if step == round(step)}
    return [Tick(round(step * 100 / last_step, 2), label) for step, label in ticks.items()]


def _references(heights: Mapping[str, float]) -> list[Reference]:
    """Lines at these heights, whose labels keep their distance; the highest line comes first."""
    found: list[Reference] = []
    for label, percent in sorted(heights.items(), key=lambda item: item[1]):
        above = found[-1].label_percent + LABEL_PERCENT if found else 0.0
        found.append(Reference(percent, label, round(max(percent, above), 2)))
    return found


def _marked(places: Mapping[str, float]) -> list[Mark]:
    """Vertical lines at these places, as far as they are on the plot; close labels are put above each other."""
    found: list[Mark] = []
    for label, percent in sorted(places.items(), key=lambda item: item[1]):
        if 0 <= percent <= 100:
            near = {mark.row for mark in found if percent - mark.percent < MARK_PERCENT}
            row = next(row for row in range(len(found) + 1) if row not in near)
            found.append(Mark(round(percent, 2), label, row))
    return found


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Moving average over a twentieth of the points, as far as they are finite."""
    width = max(5, len(y) // 20) | 1
    seen = np.isfinite(y)
    window = np.ones(width)
    with np.errstate(invalid="ignore"):
        mean = np.convolve(np.where(seen, y, 0), window, "same") / np.convolve(seen, window, "same")
    return np.where(seen, mean, np.nan)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line that breaks where y is not finite."""
    parts, command = [], "M"
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b):
            command = "M"
            continue
        parts.append(f"{command}{a:.1f} {b:.1f}")
        command = "L"
    return "".join(parts)


def _marks(x: np.ndarray, y: np.ndarray) -> str:
    """A dot on each point, drawn as a line of length zero with round ends."""
    return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True) if math.isfinite(b))


def _band(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> str:
    """The area between two lines; empty if they coincide."""
    seen = np.isfinite(top) & np.isfinite(bottom)
    x, top, bottom = x[seen], top[seen], bottom[seen]
    if np.array_equal(top, bottom):
        return ""
    return _path(x, top) + "L" + _path(x[::-1], bottom[::-1])[1:] + "Z"


def _png(ratio_EB: np.ndarray) -> bytes:
    """An indexed PNG: entry 127 is transparent, 0 opaque blue, 254 opaque orange."""
    index = np.clip(np.nan_to_num(ratio_EB, nan=1.0), 0, 2) * 127
    rows, columns = ratio_EB.shape
    pixels = np.zeros((rows, columns + 1), np.uint8)
    pixels[:, 1:] = index.round()
    deviation = np.arange(255) - 127
    palette = np.where(deviation[:, None] < 0, (37, 99, 235), (234, 88, 12)).astype(np.uint8)
    alpha = (np.abs(deviation) * 255 / 127).round().astype(np.uint8)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", palette.tobytes()),
            chunk(b"tRNS", alpha.tobytes()),
            chunk(b"IDAT", zlib.compress(pixels.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )
