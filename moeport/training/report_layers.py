"""What a report shows for each MoE layer: the load of its experts, drops and all-to-all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.config.schema import Config
from moeport.pages.charts import Bar, HeatMap, heat_map
from moeport.training.run_metrics import RunMetrics


@dataclass(frozen=True)
class ExpertLoad:
    """Loads of the experts of one layer."""

    layer: str
    last: str
    """Describes the load of the least and the most loaded expert at the end."""
    map: HeatMap


def layer_names(config: Config | None, num_layers: int) -> list[str]:
    """The layers that have experts, numbered as in the model; from 0 without a config."""
    names = config.model.moe_layer_names if config else []
    return names if len(names) == num_layers else [f"Layer {layer}" for layer in range(num_layers)]


def expert_loads(metrics: RunMetrics, layers: Sequence[str]) -> list[ExpertLoad]:
    """A heat map of each layer."""
    if metrics.loads is None:
        return []
    share_BLE = metrics.loads.mean[:, 1:].reshape(-1, len(layers), metrics.num_experts)
    ratio_LEB = share_BLE.transpose(1, 2, 0) * metrics.num_experts
    return [
        ExpertLoad(
            layer,
            f"{np.nanmin(ratio_EB[:, -1]):.2f} to {np.nanmax(ratio_EB[:, -1]):.2f} at the end",
            heat_map(ratio_EB, metrics.last.step),
        )
        for layer, ratio_EB in zip(layers, ratio_LEB, strict=True)
    ]


def drops(metrics: RunMetrics, layers: Sequence[str]) -> list[Bar]:
    """Mean drop rate of each layer; empty if nothing was dropped."""
    mean_L = metrics.dropped_L / max(1, metrics.num_listed)
    largest = mean_L.max(initial=0.0)
    if largest == 0:
        return []
    limits = [f", capacity {rows:,} at the end" for rows in metrics.capacity_L] or [""] * len(layers)
    return [
        Bar(layer + limit, f"{mean:.2%}", 100 * mean / largest)
        for layer, limit, mean in zip(layers, limits, mean_L, strict=True)
    ]


def position_drops(metrics: RunMetrics, config: Config | None) -> list[Bar]:
    """Mean drop rate in each range of sequence positions; empty if nothing was dropped."""
    mean_P = metrics.dropped_P / max(1, metrics.num_listed)
    if not mean_P.any():
        return []
    length = config.data.tokens_per_sequence if config else len(mean_P)
    first = [-(-number * length // len(mean_P)) for number in range(len(mean_P) + 1)]
    return [
        Bar(f"{start} to {end - 1}", f"{mean:.2%}", 100 * mean / mean_P.max())
        for start, end, mean in zip(first, first[1:], mean_P, strict=False)
    ]


def exchanged(metrics: RunMetrics, layers: Sequence[str]) -> list[Bar]:
    """Mean bytes per step in the all-to-all of each layer; empty unless ranks share the experts."""
    mean_L2 = metrics.exchanged_L2 / max(1, metrics.num_listed) / 1e6
    if not mean_L2.any():
        return []
    return [
        Bar(
            layer,
            f"{inside + between:,.3g} MB, {between:,.3g} MB of them between nodes",
            100 * (inside + between) / mean_L2.sum(1).max(),
        )
        for layer, (inside, between) in zip(layers, mean_L2, strict=True)
    ]
