"""The validation loss of a comparison over its cost, as an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moeport.files import atomic_file
from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.spread import Spread, spread

PANELS = {
    "rows_per_token": "rows per token, all layers",
    "flops_per_token": "FLOPs per token, forward and backward",
    "train_time": "seconds of training in all",
}
"""The figures that the loss at the end is drawn over, with their labels."""


def final_losses(comparison: Comparison, figure: str) -> Iterator[tuple[str, Spread, Spread]]:
    """For each config with finished runs, its name, a figure, and the validation loss at the end, over the seeds."""
    for name in comparison.plan.names:
        found = [one.values() for one in comparison.figures(name).values()]
        if found:
            x, y = (spread([float(one[each] or 0) for one in found]) for each in (figure, "val_loss"))
            yield name, x, y


def write_plot(path: Path, comparison: Comparison) -> None:
    """Write the loss at the end over rows, FLOPs and time, with standard deviations over the seeds as error bars.

    Needs matplotlib. Raises WriteError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        for name, x, y in final_losses(comparison, key):
            axes.errorbar(x.mean, y.mean, y.deviation, x.deviation, fmt="o", markersize=5, capsize=3, label=name)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss, nats")
    figure.axes[-1].legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
