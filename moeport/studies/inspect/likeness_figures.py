"""Figures of how alike the experts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moeport.pages.charts import Axis, LineChart
from moeport.pages.lines import Drawn
from moeport.pages.matrices import Map, matrix_map
from moeport.pages.scatter import dots_chart
from moeport.pages.tables import Table
from moeport.studies.inspect.experts import Likeness, off_diagonal
from moeport.studies.inspect.inspect import Found, LayerFound
from moeport.studies.inspect.sections import over_layers

_Named = Sequence[tuple[LayerFound, Likeness]]


def compared(layers: Sequence[LayerFound]) -> _Named:
    """The layers whose experts were compared."""
    return [(layer, layer.likeness) for layer in layers if layer.likeness is not None]


def weights_by_depth(found: Found) -> list[Drawn]:
    """Mean similarities of weights and outputs by layer."""
    shapes = [like for _, like in compared(found.layers)]
    if len(shapes) < len(found.layers):
        return []
    values = {f"{name} matrices": [off_diagonal(each.matrices[name]) for each in shapes] for name in shapes[0].matrices}
    values |= {f"{name} neurons": [off_diagonal(each.neurons[name]) for each in shapes] for name in shapes[0].neurons}
    return over_layers(Axis("Cosine", "mean over pairs of experts", "{:.3f}", from_zero=True), found, values)


def outputs_by_depth(found: Found) -> list[Drawn]:
    """Mean similarity of outputs by layer."""
    shapes = [like for _, like in compared(found.layers)]
    if len(shapes) < len(found.layers):
        return []
    values = {"outputs": [off_diagonal(each.outputs) for each in shapes]}
    axis = Axis("Angular similarity of outputs", "mean over pairs of experts", "{:.3f}", references={"unrelated": 0.5})
    return over_layers(axis, found, values)


def weights_table(layers: Sequence[LayerFound]) -> list[Table]:
    """Similarity of weights by layer and matrix, with what matching the neurons makes of it."""
    header = ["layer", "matrix", "matrices", "mean neurons", "gate rows, R²"]
    header += ["neurons as numbered", "matched", "Kendall tau"]
    rows = []
    for layer, like in compared(layers):
        for name in like.matrices:
            row = [layer.name, name, _number(off_diagonal(like.matrices[name]))]
            row += [_number(off_diagonal(like.neurons[name])), _number(like.gate_fit.get(name, float("nan")))]
            pairs = [each for each in like.matched if each.matrix == name]
            row += [_mean([key(each) for each in pairs]) for key in _MATCHED]
            rows.append(row)
    return [Table.of("Weights, mean over pairs of experts", header, rows)] if rows else []


_MATCHED: Sequence[Callable[..., float]] = (lambda each: each.before, lambda each: each.after, lambda each: each.tau)


def component_charts(layers: Sequence[LayerFound]) -> list[LineChart]:
    """The experts in the plane of two principal components, by layer and matrix."""
    charts = []
    for layer, like in compared(layers):
        for name, each in like.components.items():
            shares = " and ".join(f"{share:.0%}" for share in each.share_2)
            axis = Axis(f"{layer.name}, {name}", f"second over first component, {shares} of the variance", "{:.3g}")
            names = [f"expert {expert}" for expert in range(len(each.place_E2))]
            charts.append(dots_chart(axis, each.place_E2[:, 0], each.place_E2[:, 1], names))
    return charts


def output_maps(layers: Sequence[LayerFound]) -> list[Map]:
    """Similarity of the experts' outputs: 1/2 is unrelated and transparent."""
    return [
        matrix_map(layer.name, _experts(like), _experts(like), 2 * like.outputs, like.outputs)
        for layer, like in compared(layers)
    ]


def rank_maps(layers: Sequence[LayerFound]) -> list[Map]:
    """How often the n-th largest output has the s-th score, as a multiple of chance."""
    maps = []
    for layer, like in compared(layers):
        names = [str(rank) for rank in range(1, len(like.rank_EE) + 1)]
        ratio_EE = like.rank_EE * len(names) / like.tokens
        maps.append(matrix_map(layer.name, ("rank of norm", names), ("rank of score", names), ratio_EE, ratio_EE))
    return maps


def active_table(layers: Sequence[LayerFound]) -> list[Table]:
    """Share of active neurons by layer."""
    rows = [
        [layer.name, *(f"{share:.1%}" for share in (like.active_E.mean(), like.active_E.min(), like.active_E.max()))]
        for layer, like in compared(layers)
    ]
    return [Table.of("Active neurons", ["layer", "mean", "least expert", "most"], rows)] if rows else []


def _experts(like: Likeness) -> tuple[str, list[str]]:
    return "expert", [str(expert) for expert in range(len(like.outputs))]


def _mean(values: Sequence[float]) -> str:
    return _number(float(np.mean(values))) if values else "-"


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}" if np.isfinite(value) else "-"  # + 0.0, so that -0.0 has no sign
