"""Results of a layer benchmark as rows, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeport.bench.layer import LOCAL
from moeport.bench.layer_run import LayerRun
from moeport.bench.measure import Timing
from moeport.bench.output import size_plot

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerRow:
    """One line of the table."""

    algorithm: str
    chunks: int
    size: int
    """Bytes of the tokens per rank."""
    tokens: int
    """Tokens per rank."""
    type: str
    time_us: float
    """Median over repetitions of the time of the slowest rank."""
    low_us: float
    """Lower quartile over repetitions of the slowest rank's time."""
    high_us: float
    """Upper quartile."""
    fastest_us: float
    """Median of the fastest rank."""
    exchange_us: float
    """Median of the mean over ranks of the time spent in all-to-alls, including waiting for others."""
    tokens_per_s: float
    """Per rank."""
    intra_node_bytes_per_token: float
    """Sent within nodes in one repetition, divided by the tokens of all ranks."""
    inter_node_bytes_per_token: float
    """Sent to other nodes in one repetition, divided by the tokens of all ranks."""
    wrong: int | None
    """Elements of output and gradients with wrong values over all ranks; None: not checked."""

    @classmethod
    def of(cls, run: LayerRun, ranks: int, timing: Timing) -> LayerRow:
        """The row of one run."""
        return cls(
            algorithm=run.algorithm,
            chunks=run.chunks,
            size=run.bytes,
            tokens=run.tokens,
            type=run.type,
            time_us=timing.time_us,
            low_us=timing.low_us,
            high_us=timing.high_us,
            fastest_us=timing.fastest_us,
            exchange_us=timing.exchange_us,
            tokens_per_s=run.tokens / timing.time_us * 1e6,
            intra_node_bytes_per_token=timing.intra_node_bytes / (run.tokens * ranks),
            inter_node_bytes_per_token=timing.inter_node_bytes / (run.tokens * ranks),
            wrong=None if run.reference is None else timing.wrong,
        )


def table(rows: Sequence[LayerRow]) -> Table:
    """The results as a table."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("algorithm")
    for heading in ("chunks", "size\n(B)", "tokens", "time\n(us)", "quartiles\n(us)", "fastest\nrank\n(us)"):
        shown.add_column(heading, justify="right")
    for heading in (
        "all-to-\nall\n(us)",
        "tokens/s\nper rank",
        "in node\n(B/token)",
        "between\nnodes\n(B/token)",
        "#wrong",
    ):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.algorithm,
            str(row.chunks),
            str(row.size),
            str(row.tokens),
            f"{row.time_us:.0f}",
            f"{row.low_us:.0f} .. {row.high_us:.0f}",
            f"{row.fastest_us:.0f}",
            f"{row.exchange_us:.0f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.intra_node_bytes_per_token:,.0f}",
            f"{row.inter_node_bytes_per_token:,.0f}",
            "N/A" if row.wrong is None else str(row.wrong),
        )
    return shown


def write_plot(path: Path, rows: Sequence[LayerRow]) -> None:
    """Time over size, with one line per algorithm and number of chunks and a band between the quartiles.

    Raises WriteError.
    """
    with size_plot(path, "time of a layer, ms") as axes:
        for name, chunks in dict.fromkeys((row.algorithm, row.chunks) for row in rows):
            mine = [row for row in rows if (row.algorithm, row.chunks) == (name, chunks)]
            sizes = [row.size for row in mine]
            label = name if chunks == 1 else f"{name}, {chunks} chunks"
            style = "--" if name == LOCAL else "-"
            times = [row.time_us / 1e3 for row in mine]
            line = axes.plot(sizes, times, marker="o", markersize=3, linestyle=style, label=label)[0]
            low, high = ([getattr(row, end) / 1e3 for row in mine] for end in ("low_us", "high_us"))
            axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
