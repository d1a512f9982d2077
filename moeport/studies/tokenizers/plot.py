"""Frequencies and lengths of tokens as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeport.files import atomic_file
from moeport.studies.tokenizers.curves import PANELS, drawn
from moeport.studies.tokenizers.evaluate import Measured


def write_plot(path: Path, found: Sequence[Measured]) -> None:
    """Write the charts of the page as .png, .svg or .pdf. Needs matplotlib. Raises WriteError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for series in drawn(panel, found):
            axes.plot(series.x, series.y, label=series.label)
        axes.set_title(panel.axis.title)
        axes.set_xlabel(panel.over)
        axes.set_ylabel(panel.axis.unit)
        axes.grid(alpha=0.3)
        if panel.axis.logarithmic:
            axes.set_yscale("log")
    figure.axes[0].legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
