"""The summary of a finished run or of a dry run, and how it is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moeport.training.duration import duration

SAMPLE_TOKENS = 120
SAMPLE_PROMPT_CHARACTERS = 32
"""Greatest length of a prompt that is taken from a held-out document."""


@dataclass(frozen=True)
class RunSummary:
    """A finished run; RUN_DIR/summary.json."""

    run_dir: str
    """The run folder."""
    steps: int
    """Number of optimiser steps."""
    val_loss: float
    """Validation loss in nats per token, or per image."""
    val_bits_per_byte: float | None
    """The same loss in bits per byte of text; None for images."""
    tokens_per_second: float | None
    """Median over the steps; None if their metrics are lost."""
    wall_time: float
    """Seconds of all steps, evaluations and checkpoints, without the preparation of data."""
    peak_memory: float
    """Peak resident set of the process, GiB."""
    parameters_total: int
    """Number of trained parameters."""
    parameters_active: int
    """Number of parameters that one token uses."""
    training_flops_per_token: int
    """FLOPs of the forward and backward pass per token."""
    device: str
    """Description of the device."""
    dtype: str
    """Compute type."""
    versions: dict[str, str]
    """Versions of Python, moeport and the framework."""
    checkpoint: str
    """The last checkpoint."""
    commit: str = ""
    """The commit of moeport that was started last; with `-dirty` if its sources had been changed; empty if unknown."""
    kernels: dict[str, str] = field(default_factory=dict)
    """What computed each kernel, and why; empty for runs of versions that did not say."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that change what is computed, those of `moeport.training.agreed`, as they were set."""
    val_accuracy: float | None = None
    """Share of the held-out images for which the right class has the highest score; None for text."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Bits per byte of general compressors on the same files, each compressed separately; empty for images."""
    sample: dict[str, str] | None = None
    """`prompt` and the generated `text`; None for images."""
    save_time: float = 0.0
    """Seconds of this process for which training waited for checkpoints."""
    skipped: int = 0
    """Files and rows of the source that were skipped since they cannot be read."""
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """For a mixture, by source, the `tokens` that were trained on and how many `epochs` of it they are."""
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    """By domain, the `tokens` that were trained on and how many `epochs` of it they are."""
    val_loss_by_domain: dict[str, float] | None = None
    """Validation loss on the text of each domain; None without domains."""
    compilations: int = 0
    """Number of graphs that the backend compiled in this process; PyTorch's are not counted."""
    compile_seconds: float = 0.0
    """Seconds spent compiling them, including the first run of each."""
    capacity_per_layer: list[int] = field(default_factory=list)
    """Expert capacity of each MoE layer in the last step, in assignments; empty without a limit."""
    drop_rate: float = 0.0
    """Share of the chosen assignments that were dropped in the last step."""

    def __rich__(self) -> RenderableType:
        """The closing panel on a terminal."""
        table = _table()
        unit = "token" if self.val_accuracy is None else "image"
        table.add_row("validation loss", f"{self.val_loss:.4f} nats per {unit}")
        if self.val_bits_per_byte is not None:
            others = ", ".join(f"{name}: {bits:.3f}" for name, bits in self.baselines.items())
            table.add_row("bits per byte", f"{self.val_bits_per_byte:.3f}  ({others}, each held-out file separately)")
        if self.val_accuracy is not None:
            table.add_row("accuracy", f"{self.val_accuracy:.2%} of the held-out images")
        speed = "unknown" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"
        table.add_row("speed", f"{speed} on {self.device}, {self.dtype}")
        table.add_row("time, memory", f"{duration(self.wall_time)}, at most {self.peak_memory:.2f} GiB")
        if self.compilations:
            table.add_row("compiled", f"{self.compilations} graphs in {duration(self.compile_seconds)}")
        table.add_row("parameters", f"{self.parameters_total:,} ({self.parameters_active:,} active per token)")
        if self.capacity_per_layer:
            rows = ", ".join(f"{rows:,}" for rows in self.capacity_per_layer)
            table.add_row("capacity", f"{rows} assignments per expert, by layer; dropped: {self.drop_rate:.1%}")
        if self.skipped:
            what = f"{self.skipped:,} file{'' if self.skipped == 1 else 's'} or row{'' if self.skipped == 1 else 's'}"
            table.add_row("skipped", f"{what} that cannot be read (data.source.bad_files)")
        for name, drawn in self.sources.items():
            table.add_row(f"source {name}", f"{drawn['tokens']:,.0f} tokens, {drawn['epochs']:.2f} epochs")
        for name, drawn in self.domains.items():
            loss = f"{(self.val_loss_by_domain or {}).get(name, math.nan):.4f} nats per token"
            table.add_row(f"domain {name}", f"{loss}; {drawn['tokens']:,.0f} tokens, {drawn['epochs']:.2f} epochs")
        table.add_row("checkpoint", self.checkpoint)
        run = Path(self.run_dir)
        table.add_row("metrics", str(run / "metrics.jsonl"))
        table.add_row("report", str(run / "report.html"))
        panel = Panel(table, title=Text(f"{self.run_dir}: {self.steps:,} steps done"), title_align="left")
        if self.sample is None:
            return panel
        text = Text(self.sample["prompt"], style="bold").append(self.sample["text"], style="not bold")
        return Group(panel, Panel(text, title="a sample (bold: the prompt)", title_align="left"))


@dataclass(frozen=True)
class DryRun:
    """What a run would do; nothing was written to its folder."""

    parameters_total: int
    """Number of trained parameters."""
    parameters_active: int
    """Number of parameters that one token uses."""
    training_flops_per_token: int
    """FLOPs of the forward and backward pass per token."""
    tokens_per_step: int
    """Batch size times sequence length."""
    steps: int
    """Number of optimiser steps."""
    epochs: float
    """Passes over the training data."""
    seconds_per_step: float
    """Measured on the second step."""
    device: str
    """Description of the device."""
    dtype: str
    """Compute type."""
    memory: str = ""
    """What a rank needs, as it was estimated, and what it took."""

    def __rich__(self) -> RenderableType:
        """A panel that describes the run."""
        table = _table()
        table.add_row("parameters", f"{self.parameters_total:,} ({self.parameters_active:,} active per token)")
        table.add_row("training FLOPs", f"{self.training_flops_per_token:,} per token")
        table.add_row("tokens", f"{self.tokens_per_step:,} per step, {self.epochs:.2f} epochs in {self.steps:,} steps")
        total = duration(self.seconds_per_step * self.steps)
        table.add_row("time", f"{self.seconds_per_step:.3f} s per step, about {total} in total, without evaluation")
        if self.memory:
            table.add_row("memory", self.memory)
        table.add_row("device", f"{self.device}, {self.dtype}")
        return Panel(table, title="dry run: nothing was written to the run folder", title_align="left")


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
