"""What a run says of itself at the end, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moeport.training.duration import duration

SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class RunSummary:
    """A finished run; RUN_DIR/summary.json."""

    run_dir: str
    """The run folder."""
    steps: int
    """Optimiser steps."""
    val_loss: float
    """Validation loss, nats a token; of images nats an image."""
    val_bits_per_byte: float | None
    """The same in bits per byte of text; None for images."""
    tokens_per_second: float
    """Median over the steps."""
    wall_time: float
    """Seconds of all steps, evaluations and checkpoints, without the preparation of data."""
    peak_memory: float
    """Largest resident set of the process, GiB."""
    parameters_total: int
    """Trained parameters."""
    parameters_active: int
    """Those that one token uses."""
    training_flops_per_token: int
    """Forward and backward."""
    device: str
    """Device in words."""
    dtype: str
    """Compute type."""
    versions: dict[str, str]
    """Python, moeport and framework."""
    checkpoint: str
    """The last checkpoint."""
    val_accuracy: float | None = None
    """Share of the held-out images whose class has the highest score; None for text."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Bits per byte of general compressors on the same files, each file by itself; empty for images."""
    sample: dict[str, str] | None = None
    """`prompt` and the generated `text`; None for images."""
    compilations: int = 0
    """Graphs that the backend compiled in this process; PyTorch's are not counted."""
    compile_seconds: float = 0.0
    """Their time, the first run of each included."""
    capacity_per_layer: list[int] = field(default_factory=list)
    """Assignments that an expert could serve in the last step, of each MoE layer; empty where there is no limit."""
    drop_rate: float = 0.0
    """Dropped over chosen assignments in the last step."""

    def __rich__(self) -> RenderableType:
        """The closing panel on a terminal."""
        table = _table()
        unit = "a token" if self.val_accuracy is None else "an image"
        table.add_row("validation loss", f"{self.val_loss:.4f} nats {unit}")
        if self.val_bits_per_byte is not None:
            others = ", ".join(f"{name}: {bits:.3f}" for name, bits in self.baselines.items())
            table.add_row("bits per byte", f"{self.val_bits_per_byte:.3f}  ({others}, each held-out file by itself)")
        if self.val_accuracy is not None:
            table.add_row("accuracy", f"{self.val_accuracy:.2%} of the held-out images")
        table.add_row("speed", f"{self.tokens_per_second:,.0f} tokens/s on {self.device}, {self.dtype}")
        table.add_row("time, memory", f"{duration(self.wall_time)}, at most {self.peak_memory:.2f} GiB")
        if self.compilations:
            table.add_row("compiled", f"{self.compilations} graphs in {duration(self.compile_seconds)}")
        table.add_row("parameters", f"{self.parameters_total:,} ({self.parameters_active:,} active a token)")
        if self.capacity_per_layer:
            rows = ", ".join(f"{rows:,}" for rows in self.capacity_per_layer)
            table.add_row("capacity", f"{rows} assignments an expert by layer; dropped: {self.drop_rate:.1%}")
        table.add_row("checkpoint", self.checkpoint)
        run = Path(self.run_dir)
        table.add_row("metrics", str(run / "metrics.jsonl"))
        table.add_row("report", str(run / "report.html"))
        panel = Panel(table, title=f"{self.run_dir}: {self.steps:,} steps done", title_align="left")
        if self.sample is None:
            return panel
        text = Text(self.sample["prompt"], style="bold").append(self.sample["text"], style="not bold")
        return Group(panel, Panel(text, title="a sample (bold: the prompt)", title_align="left"))


@dataclass(frozen=True)
class DryRun:
    """What a run would be; nothing was written to its folder."""

    parameters_total: int
    """Trained parameters."""
    parameters_active: int
    """Those that one token uses."""
    training_flops_per_token: int
    """Forward and backward."""
    tokens_per_step: int
    """Batch size times sequence length."""
    steps: int
    """Optimiser steps."""
    epochs: float
    """Passes over the training data."""
    seconds_per_step: float
    """Measured on the second step."""
    device: str
    """Device in words."""
    dtype: str
    """Compute type."""

    def __rich__(self) -> RenderableType:
        """A panel of what would be done."""
        table = _table()
        table.add_row("parameters", f"{self.parameters_total:,} ({self.parameters_active:,} active a token)")
        table.add_row("training FLOPs", f"{self.training_flops_per_token:,} a token")
        table.add_row("tokens", f"{self.tokens_per_step:,} a step, {self.epochs:.2f} epochs in {self.steps:,} steps")
        total = duration(self.seconds_per_step * self.steps)
        table.add_row("time", f"{self.seconds_per_step:.3f} s a step, about {total} in all, without evaluation")
        table.add_row("device", f"{self.device}, {self.dtype}")
        return Panel(table, title="dry run: nothing was written to the run folder", title_align="left")


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
