"""The types of a row in the table of metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moeport.pages.charts import Axis

NATS = "nats/token"
"""Unit of cross entropies; for images the report replaces it by nats per image."""
BITS_PER_BYTE = "bits/byte"
"""Unit in which the run is compared with general-purpose compressors."""


@dataclass(frozen=True)
class Printed:
    """How a metric appears in the lines that a run prints."""

    name: str
    show: str
    """Format of the value."""


@dataclass(frozen=True)
class Chart:
    """How the report draws a metric over the steps."""

    section: str
    """Heading above the chart; metrics with the same section and title share a chart."""
    axis: Axis
    """Title, unit and format."""
    line: str = ""
    """Label of the line in a chart with several lines."""
    order: int = 1
    """Charts of a section are sorted by this number, then by their order in the table."""
    unless_zero: bool = False
    """Leave it out if every value is 0, as for a loss that is turned off."""
    weight: str = ""
    """Key of the weight of a loss term; a report leaves it out where the config has 0 there."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    doc: str
    """Description, which docs/training.md shows."""
    reduction: Literal["sum", "mean"] | None = None
    """How the values that the MoE layers measure under this name (`moeport.model.moe_metrics.measurements`) are reduced
    over passes, micro-batches and ranks, and also over the layers unless the metric is a list. None: the trainer
    computes the metric itself."""
    tag: str | None = None
    """TensorBoard tag; with `{layer}`, one tag per entry of a list, with `{key}`, one per entry of a mapping. None: not
    in TensorBoard."""
    printed: Printed | None = None
    """None: not printed."""
    chart: Chart | None = None
    """None: the report does not draw it over the steps."""
    only_with: str | None = None
    """A field; if it is empty, TensorBoard and the printed lines leave this metric out."""
    left_out_of_file: float | None = None
    """A value that is left out of metrics.jsonl: the default, where it is rare that it is another."""
    only_if_known: bool = False
    """Whether metrics.jsonl leaves out a value of None, as of a metric that only some runs have."""
    null_is_none: bool = False
    """Whether null in metrics.jsonl means None; otherwise it means a NaN or an infinity."""

    def applies(self, record: Any) -> bool:
        """Whether the metric is meaningful in a record."""
        return self.only_with is None or bool(getattr(record, self.only_with))
