"""The sections of the page: charts, maps and tables of what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from moeport.pages.charts import Axis, LineChart, Series, line_chart
from moeport.pages.lines import Drawn
from moeport.pages.matrices import Map, matrix_map, ticks
from moeport.pages.tables import Table
from moeport.studies.inspect.inspect import Earlier, Found, LayerFound
from moeport.studies.inspect.likeness_figures import (
    active_table,
    component_charts,
    output_maps,
    outputs_by_depth,
    rank_maps,
    weights_by_depth,
    weights_table,
)
from moeport.studies.inspect.sections import Section, over_layers, shown_layers
from moeport.studies.inspect.text import bounds_table, robustness_table


def sections(found: Found) -> list[Section]:
    """All sections that have something to show."""
    shown, datasets = shown_layers(found), found.keys.datasets
    made = [
        Section("ids", charts=_present(_spread_chart(layer) for layer in shown)),
        Section("depth", listed=_depth(found)),
        Section("top", tables=[_top_table(layer) for layer in shown if len(layer.by_id.rows)]),
        Section("positions", maps=[_position_map(found, layer) for layer in shown]),
        Section("datasets", maps=[_dataset_map(layer, datasets) for layer in shown] if len(datasets) > 1 else []),
        Section("drops", listed=_drops(found)),
        Section("dataset_drops", tables=_dataset_drops(found)),
        Section("early", listed=_over_steps(found, _OVERLAP, lambda each, i: each.overlap[i])),
        Section("separation", listed=_over_steps(found, _SEPARATION, lambda each, i: each.geometry[i].separation)),
        Section(
            "angles",
            charts=_present(_angles(found, i, layer) for i, layer in enumerate(found.layers) if layer in shown),
        ),
        Section("bounds", tables=bounds_table(found)),
        Section("robustness", tables=robustness_table(found)),
        Section("weights", listed=weights_by_depth(found), tables=weights_table(found.layers)),
        Section("components", charts=component_charts(shown)),
        Section("outputs", listed=outputs_by_depth(found), maps=output_maps(shown)),
        Section("ranks", maps=rank_maps(shown)),
        Section("active", tables=active_table(found.layers)),
    ]
    return [each for each in made if not each.is_empty]


def _present(charts: Iterable[LineChart | None]) -> list[LineChart]:
    return [chart for chart in charts if chart is not None]


def _spread_chart(layer: LayerFound) -> LineChart | None:
    """Deviations of ids and of positions, each sorted, over the percentage of rows."""
    series = []
    for label, spread in {"token ids": layer.by_id, "positions": layer.by_position}.items():
        if count := len(spread.rows):
            x = np.arange(1, count + 1) * 100 / count
            points = [f"{percent:.0f}% of the rows" for percent in x]
            series.append(Series(label, x, np.sort(spread.deviation)[::-1], points))
    references = {"chance": layer.by_id.chance, "even": 0.0}
    axis = Axis(
        layer.name,
        "deviation of the shares, over % of the rows",
        "{:.3f}",
        from_zero=True,
        references={label: value for label, value in references.items() if np.isfinite(value)},
    )
    return line_chart(axis, series, 100.0)


def _depth(found: Found) -> list[Drawn]:
    axis = Axis("Deviation of the shares", "mean over the rows", "{:.3f}", from_zero=True)
    values = {
        "token ids": [layer.by_id.mean for layer in found.layers],
        "ids by chance": [layer.by_id.chance for layer in found.layers],
        "positions": [layer.by_position.mean for layer in found.layers],
        "positions by chance": [layer.by_position.chance for layer in found.layers],
    }
    return over_layers(axis, found, values)


def _top_table(layer: LayerFound) -> Table:
    load_E = layer.counts.load / max(1, layer.counts.load.sum())
    rows = [
        [str(expert), f"{load_E[expert]:.1%}", " · ".join(f"{each.text} {each.share:.0%}" for each in top)]
        for expert, top in enumerate(layer.top_ids)
    ]
    return Table.of(layer.name, ["expert", "load", "token ids, with the share of each that goes to the expert"], rows)


def _position_map(found: Found, layer: LayerFound) -> Map:
    drawn = _share_map(layer, ("positions", _ranges(found)), layer.counts.position_PE)
    firsts = ticks([str(first) for first in found.keys.edges[:-1]])
    return replace(drawn, picture=replace(drawn.picture, x_ticks=firsts))


def _ranges(found: Found) -> list[str]:
    """The ranges of positions, each by its first and last."""
    return [f"{first}-{end - 1}" if end - first > 1 else str(first) for first, end in pairwise(found.keys.edges)]


def _dataset_map(layer: LayerFound, datasets: Sequence[str]) -> Map:
    return _share_map(layer, ("dataset", datasets), layer.counts.dataset_YE)


def _share_map(layer: LayerFound, columns: tuple[str, Sequence[str]], count_CE: np.ndarray) -> Map:
    """Shares of the experts in each column, as multiples of an even share."""
    experts = count_CE.shape[1]
    ratio_EC = (count_CE * experts / np.maximum(1, count_CE.sum(1, keepdims=True))).T
    return matrix_map(layer.name, ("expert", [str(expert) for expert in range(experts)]), columns, ratio_EC, ratio_EC)


def _drops(found: Found) -> list[Drawn]:
    """Drop rates by position, a line for each layer; none without drops."""
    if not any(layer.counts.dropped_P.any() for layer in found.layers):
        return []
    edges = found.keys.edges
    x = (edges[:-1] + edges[1:] - 1) / 2
    points = [f"positions {each}" for each in _ranges(found)]
    series = [Series(layer.name, x, layer.counts.drop_rates, points) for layer in shown_layers(found)]
    axis = Axis("Drop rate", found.capacity, "{:.1%}", percent=True, from_zero=True)
    chart = line_chart(axis, series, float(found.keys.length))
    return [Drawn("positions of the sequence", chart)] if chart else []


def _dataset_drops(found: Found) -> list[Table]:
    if len(found.keys.datasets) < 2 or not any(layer.counts.dropped_P.any() for layer in found.layers):
        return []
    rows = [
        [layer.name, *(f"{rate:.1%}" if np.isfinite(rate) else "-" for rate in layer.counts.dataset_drop_rates)]
        for layer in found.layers
    ]
    return [Table.of("Drop rate", ["layer", *found.keys.datasets], rows)]


_OVERLAP = Axis("Overlap with the inspected checkpoint", "1 is the same routing", "{:.2f}", from_zero=True)
_SEPARATION = Axis("CH", "higher is more separate", "{:.3f}", from_zero=True)


def _over_steps(found: Found, axis: Axis, value: Callable[[Earlier, int], float]) -> list[Drawn]:
    """A value of each checkpoint, a line for each layer; over the layers if there is one checkpoint."""
    steps = [each.step for each in found.history]
    if not steps or not steps[-1]:
        return []
    points = [f"step {step:,}" for step in steps]
    series = [
        Series(layer.name, np.array(steps, float), np.array([value(each, i) for each in found.history]), points)
        for i, layer in enumerate(found.layers)
        if layer in shown_layers(found)
    ]
    chart = line_chart(axis, series, float(steps[-1]))
    return [Drawn("steps", chart)] if chart else []


def _angles(found: Found, number: int, layer: LayerFound) -> LineChart | None:
    """Angles over the checkpoints."""
    steps = [each.step for each in found.history]
    if not steps or not steps[-1]:
        return None
    points, x = [f"step {step:,}" for step in steps], np.array(steps, float)
    series = [
        Series("own expert", x, np.array([each.geometry[number].own_angle for each in found.history]), points),
        Series("others", x, np.array([each.geometry[number].other_angle for each in found.history]), points),
    ]
    return line_chart(Axis(layer.name, "degrees, over the steps", "{:.1f}°", references={"90°": 90.0}), series, x[-1])
