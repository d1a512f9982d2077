"""What a run says of itself at the end, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

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
    """Validation loss, nats a token."""
    val_bits_per_byte: float
    """The same in bits per byte of text."""
    baselines: dict[str, float]
    """Bits per byte of general compressors on the same files, each file by itself."""
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
    sample: dict[str, str]
    """`prompt` and the generated `text`."""
    compilations: int = 0
    """Graphs that the backend compiled in this process; PyTorch's are not counted."""
    compile_seconds: float = 0.0
    """Their time, the first run of each included."""

    def __rich__(self) -> RenderableType:
        """The closing panel on a terminal."""
        table = _table()
        table.add_row("validation loss", f"{self.val_loss:.4f} nats a token")
        others = ", ".join(f"{name}: {bits:.3f}" for name, bits in self.baselines.items())
        table.add_row("bits per byte", f"{self.val_bits_per_byte:.3f}  ({others}, each held-out file by itself)")
        table.add_row("speed", f"{self.tokens_per_second:,.0f} tokens/s on {self.device}, {self.dtype}")
        table.add_row("time, memory", f"{duration(self.wall_time)}, at most {self.peak_memory:.2f} GiB")
        if self.compilations:
            table.add_row("compiled", f"{self.compilations} graphs in {duration(self.compile_seconds)}")
        table.add_row("parameters", f"{self.parameters_total:,} ({self.parameters_active:,} active a token)")
        table.add_row("checkpoint", self.checkpoint)
        run = Path(self.run_dir)
        table.add_row("metrics", str(run / "metrics.jsonl"))
        table.add_row("report", str(run / "report.html"))
        text = Text(self.sample["prompt"], style="bold").append(self.sample["text"], style="not bold")
        return Group(
            Panel(table, title=f"{self.run_dir}: {self.steps:,} steps done", title_align="left"),
            Panel(text, title="a sample (bold: the prompt)", title_align="left"),
        )


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
    """Passes over the training text."""
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


def duration(seconds: float) -> str:
    """Seconds as 1h02m03s, without leading zero parts."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m{rest:02d}s"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
