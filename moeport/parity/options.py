"""The options of `moeport parity`. Imports nothing heavy, since the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SAMPLE_SIZE = 4096
"""Entries of a sampled tensor."""
PARTS = ("forward", "routing", "gradients", "optimizer", "trajectory")
"""Parts of a comparison, in the order of execution."""


@dataclass(frozen=True)
class Amount:
    """How much to compute, as given by the user; see `moeport.parity.subject.Size`."""

    sequences: int | None = None
    """Per batch; None: 2, or the number of micro-batches."""
    tokens: int = 64
    """Per sequence of text; images are always whole."""
    steps: int = 5
    """Number of optimiser steps in the trajectory."""
    micro_batches: int | None = None
    """None: one per rank."""


@dataclass(frozen=True)
class BundleOptions:
    """What goes into a bundle."""

    replay: Path | None = None
    """A bundle whose routing is used; None: the variant's own."""
    keep: list[str] | None = None
    """Entries of the form `KIND=HOW`; see `moeport.parity.recording.kept_kinds`."""
    sample_size: int = SAMPLE_SIZE
    """Entries of a sampled tensor."""
    overwrite: bool = False
    """Replace an older bundle."""


@dataclass(frozen=True)
class ReportFiles:
    """Where a report goes besides the terminal, and what a warning means."""

    json_file: Path | None = None
    markdown: Path | None = None
    html_file: Path | None = None
    overwrite: bool = False
    """Replace older files."""
    strict: bool = False
    """Exit with 1 on a warning too."""
