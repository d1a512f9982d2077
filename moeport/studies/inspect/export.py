"""Everything that was found, for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from moeport.studies.inspect.experts import Likeness
from moeport.studies.inspect.inspect import Found, LayerFound
from moeport.training.routing_spread import Spread


def as_json(found: Found) -> dict[str, Any]:
    """The whole result; what is not a finite number becomes null."""
    edges = found.keys.edges.tolist()
    whole = {
        "model": str(found.place),
        "checkpoint": found.checkpoint,
        "step": found.step,
        "options": asdict(found.options),
        "tokens": found.tokens,
        "datasets": list(found.keys.datasets),
        "position_ranges": [[first, end] for first, end in pairwise(edges)],
        "capacity": found.capacity,
        "notes": list(found.notes),
        "robustness": None if found.robustness is None else asdict(found.robustness),
        "layers": [_layer(layer, found) for layer in found.layers],
        "checkpoints": [asdict(each) for each in found.history],
    }
    cleaned: dict[str, Any] = _finite(whole)
    return cleaned


def _layer(layer: LayerFound, found: Found) -> dict[str, Any]:
    counts, ids = layer.counts, found.keys.id_X
    return {
        "layer": layer.name,
        "load": counts.load.tolist(),
        "by_position": counts.position_PE.tolist(),
        "by_dataset": counts.dataset_YE.tolist(),
        "drop_rate": counts.drop_rate,
        "drop_rate_by_position": counts.drop_rates.tolist(),
        "drop_rate_by_dataset": counts.dataset_drop_rates.tolist(),
        "capacities": sorted(set(counts.capacities)),
        "spread_by_id": _spread(layer.by_id) | {"ids": ids[layer.by_id.rows].tolist()},
        "spread_by_position": _spread(layer.by_position) | {"ranges": layer.by_position.rows.tolist()},
        "top_ids": [[asdict(each) for each in top] for top in layer.top_ids],
        "mean_load": counts.mean_load,
        "busiest": list(counts.busiest),
        **asdict(layer.geometry),
        "bounds": None if layer.bounds is None else asdict(layer.bounds),
        "experts": None if layer.likeness is None else _likeness(layer.likeness),
    }


def _likeness(likeness: Likeness) -> dict[str, Any]:
    return {
        "matrices": {name: x_EE.tolist() for name, x_EE in likeness.matrices.items()},
        "neurons": {name: x_EE.tolist() for name, x_EE in likeness.neurons.items()},
        "components": {
            name: {"experts": each.place_E2.tolist(), "variance_shares": each.share_2.tolist()}
            for name, each in likeness.components.items()
        },
        "matched": [asdict(each) for each in likeness.matched],
        "gate_r_squared": dict(likeness.gate_fit),
        "outputs": likeness.outputs.tolist(),
        "norm_rank_by_score_rank": likeness.rank_EE.tolist(),
        "active": likeness.active_E.tolist(),
        "tokens": likeness.tokens,
    }


def _spread(spread: Spread) -> dict[str, Any]:
    return {"mean": spread.mean, "chance": spread.chance, "deviation": spread.deviation.tolist()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
