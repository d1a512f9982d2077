"""Results of a communication benchmark as a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeport.bench.measure import Timing
from moeport.bench.operations import Measured
from moeport.errors import UserError
from moeport.files import atomic_file, check_output
from moeport.files import write_json as write_as_json
from moeport.optional import load

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table; columns and units as in nccl-tests."""

    operation: str
    size: int
    """Bytes."""
    count: int
    """Elements."""
    type: str
    redop: str
    root: int
    time_us: float
    """Median over repetitions of the time of the slowest rank."""
    algbw: float
    """GB/s (1e9): size over time."""
    busbw: float
    """GB/s (1e9): algbw times the fraction that must cross a link."""
    wrong: int | None
    """Elements with wrong values over all ranks; None: not checked."""
    fastest_us: float
    """Median of the fastest rank."""
    low_us: float
    """Lower quartile over repetitions of the slowest rank's time."""
    high_us: float
    """Upper quartile."""
    intra_node_bytes: int
    """Sent by all ranks in one repetition within their nodes."""
    inter_node_bytes: int
    """Sent by all ranks in one repetition to other nodes."""

    @classmethod
    def of(cls, name: str, operation: Measured, timing: Timing) -> Row:
        """The row of one operation."""
        algbw = operation.bytes / timing.time_us / 1e3
        return cls(
            operation=name,
            size=operation.bytes,
            count=operation.count,
            type=operation.type,
            redop=operation.redop,
            root=operation.root,
            time_us=timing.time_us,
            algbw=algbw,
            busbw=algbw * operation.bus_factor,
            wrong=timing.wrong,
            fastest_us=timing.fastest_us,
            low_us=timing.low_us,
            high_us=timing.high_us,
            intra_node_bytes=timing.intra_node_bytes,
            inter_node_bytes=timing.inter_node_bytes,
        )


def table(rows: Sequence[Row]) -> Table:
    """The columns of nccl-tests, plus what it lacks: spread, and bytes between nodes."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("operation", "type", "redop", "root"):
        shown.add_column(heading)
    for heading in ("size\n(B)", "count", "time\n(us)", "algbw\n(GB/s)", "busbw\n(GB/s)", "#wrong"):
        shown.add_column(heading, justify="right")
    for heading in ("quartiles\n(us)", "fastest rank\n(us)", "between nodes\n(B)"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.operation,
            row.type,
            row.redop,
            str(row.root),
            str(row.size),
            str(row.count),
            f"{row.time_us:.1f}",
            f"{row.algbw:.3f}",
            f"{row.busbw:.3f}",
            "N/A" if row.wrong is None else str(row.wrong),
            f"{row.low_us:.0f} .. {row.high_us:.0f}",
            f"{row.fastest_us:.1f}",
            str(row.inter_node_bytes),
        )
    return shown


def average_busbw(rows: Sequence[Row]) -> float:
    """Mean bus bandwidth over all rows, in GB/s."""
    return sum(row.busbw for row in rows) / len(rows)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The last lines of nccl-tests, and the mean bus bandwidth of each operation if there are several."""
    wrong = sum(row.wrong or 0 for row in rows)
    checked = any(row.wrong is not None for row in rows)
    yield f"# Out of bounds values : {wrong} {'FAILED' if wrong else 'OK'}" if checked else "# values were not checked"
    yield f"# Avg bus bandwidth    : {average_busbw(rows):g}"
    names = list(dict.fromkeys(row.operation for row in rows))
    for name in names if len(names) > 1 else []:
        yield f"#   {name:18s} : {average_busbw([row for row in rows if row.operation == name]):g}"


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[DataclassInstance]) -> None:
    """All rows, and what they were measured on."""
    write_as_json(path, {**about, "rows": [asdict(row) for row in rows]})


def write_csv(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """One line per row, with a header."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Bus bandwidth over size, with one line per operation and a band between the quartiles of the times.

    Raises WriteError.
    """
    with size_plot(path, "bus bandwidth, GB/s (1e9)") as axes:
        for name in dict.fromkeys(map(_variant, rows)):
            mine = [row for row in rows if _variant(row) == name]
            sizes = [row.size for row in mine]
            line = axes.plot(sizes, [row.busbw for row in mine], marker="o", markersize=3, label=name)[0]
            low = [row.busbw * row.time_us / row.high_us for row in mine]
            high = [row.busbw * row.time_us / row.low_us for row in mine]
            axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _variant(row: Row) -> str:
    """The operation with what it is varied by, where that is not the default."""
    words = (row.type, "max" if row.redop == "max" else "", f"from {row.root}" if row.root > 0 else "")
    return " ".join([row.operation, *filter(None, words)])


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be written.

    Raises UserError without matplotlib, for a file type that matplotlib cannot write, or as `check_output`.
    """
    figure = load("matplotlib.figure", f"--plot {path}", "plot").Figure()
    if path.suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--plot {path}: not the name of an image; expected one that ends in .png, .svg or .pdf")
    check_output(path)


@contextmanager
def size_plot(path: Path, quantity: str) -> Iterator[Axes]:
    """Axes of a quantity over size, both logarithmic; written to a file at the end of the block.

    Raises WriteError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("size of one rank, bytes")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
