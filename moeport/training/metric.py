"""What a row of the table of metrics says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moeport.pages.charts import Axis

NATS = "nats/token"
"""Unit of a cross entropy; on images it stands for nats per image."""
BITS_PER_BYTE = "bits/byte"
"""Unit in which general compressors are drawn beside the run."""


@dataclass(frozen=True)
class Printed:
    """How a metric is written in the progress of a run."""

    name: str
    show: str
    """Format of the value."""


@dataclass(frozen=True)
class Chart:
    """How the report draws a metric over the steps."""

    section: str
    """Heading it stands under; metrics of one section and title share a chart."""
    axis: Axis
    """Title, unit and format."""
    line: str = ""
    """Name of the line in a chart of several."""
    place: int = 1
    """Charts of a section stand in the order of their places, then in that of the table."""
    unless_zero: bool = False
    """Leave it out where every value is 0, such as a loss that is turned off."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    doc: str
    """What it is: a line of docs/training.md."""
    reduction: Literal["sum", "mean"] | None = None
    """Of what the MoE layers measure under its name (`moeport.model.moe_metrics.measurements`): how it is reduced over
    passes, micro-batches and ranks, and over the layers unless the value is a list. None: the trainer computes it."""
    tag: str | None = None
    """TensorBoard tag; with `{layer}` one for each entry of a list. None: not in TensorBoard."""
    printed: Printed | None = None
    """None: not printed."""
    chart: Chart | None = None
    """None: the report does not draw it over the steps."""
    only_with: str | None = None
    """Field without which, where it is empty, TensorBoard and the printed lines leave this one out."""
    null_is_none: bool = False
    """Whether null in metrics.jsonl stands for None; else it stands for a NaN or an infinity."""

    def applies(self, record: Any) -> bool:
        """Whether the value means something in a record."""
        return self.only_with is None or bool(getattr(record, self.only_with))
