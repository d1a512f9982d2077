"""What the routers of a run have learned: the whole analysis, layer by layer and checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeport.core.bounds import delta_max_bound, lower_bound
from moeport.data.tokenizer import name_of
from moeport.errors import CheckpointError
from moeport.studies.inspect.counts import Keys, LayerCounts, count
from moeport.studies.inspect.experts import Likeness, likeness
from moeport.studies.inspect.geometry import Geometry, geometry
from moeport.studies.inspect.opened import Opened, open_run
from moeport.studies.inspect.options import Options
from moeport.studies.inspect.texts import Portion, file_portions, held_out_portions
from moeport.studies.inspect.walk import Layer, Walk
from moeport.training.routing_spread import Spread, overlap, spread

TOP_IDS = 8
"""Token ids that are shown of each expert."""


@dataclass(frozen=True)
class TopId:
    """A token id that an expert gets."""

    text: str
    share: float
    """Share of the assignments of the id that go to the expert."""
    count: int
    """Assignments of the id."""


@dataclass(frozen=True)
class LayerFound:
    """Everything about one layer."""

    name: str
    counts: LayerCounts
    by_id: Spread
    by_position: Spread
    top_ids: Sequence[Sequence[TopId]]
    """By expert, those of highest share."""
    geometry: Geometry
    likeness: Likeness | None
    """None: the experts were not compared."""
    bounds: Bounds | None
    """None for a router without gate rows."""


@dataclass(frozen=True)
class Bounds:
    """Capacities that LocMoE's theory gives, in assignments of an expert; infinite where it says nothing."""

    locmoe: float
    """At the mean cosine, with independent cosines (LocMoE, theorem 1; their independence is ours)."""
    locmoe_plus: float
    """At the largest cosine (LocMoE+, remark 7)."""


@dataclass(frozen=True)
class Robustness:
    """The loss with and without the first choice of every token (CartesianMoE, arXiv 2410.16077)."""

    loss: float
    """Nats per token."""
    loss_without: float
    """With the first choice unrouted in every layer; the gates of the others stay as they are."""


@dataclass(frozen=True)
class Earlier:
    """An earlier checkpoint, held against the one that is looked at."""

    step: int
    overlap: Sequence[float]
    """By layer, of the histograms of token ids."""
    geometry: Sequence[Geometry]
    """By layer."""
    drop_rate: Sequence[float]
    """By layer."""


@dataclass(frozen=True)
class Found:
    """The result of `moeport inspect`."""

    place: Path
    checkpoint: str
    step: int
    model: str
    """A line that says what the model is."""
    options: Options
    keys: Keys
    tokens: int
    """Tokens of text that were looked at."""
    capacity: str
    """What was dropped by which rule."""
    layers: Sequence[LayerFound]
    robustness: Robustness | None
    """None: it was not asked for, or experts choose the tokens."""
    history: Sequence[Earlier]
    """Oldest first; the checkpoint itself last. Empty if there is only that one."""
    notes: Sequence[str]


def inspect_run(
    run_dir: Path,
    options: Options,
    texts: Sequence[str] = (),
    place: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Found:
    """Inspect a checkpoint of a run.

    Args:
        run_dir: the run folder.
        options: what is looked at.
        texts: files, folders or globs of text; empty: the run's own held-out text.
        place: what the user calls it, if it is not the run folder.
        report: is given a sentence on what is being done.

    Raises: UserError, ConfigError, DataError or CheckpointError for what the user can fix.
    """
    opened = open_run(run_dir, options)
    notes: list[str] = []
    portions = _portions(opened, options, texts, notes, report)
    keys = Keys.of(portions)
    names = [name_of(opened.tokenizer, int(number)) for number in keys.id_X]
    layers = []
    walk = opened.walk(portions, report=report)
    for layer in walk:
        counts = count(layer, keys)
        by_id = spread(counts.id_XE, options.least)
        top = _top_ids(counts.id_XE, by_id.rows, names)
        by_position = spread(counts.position_PE, options.least)
        alike = likeness(layer, options.compared) if options.compared else None
        shape = geometry(layer)
        layers.append(LayerFound(layer.name, counts, by_id, by_position, top, shape, alike, bounds_of(layer, shape)))
    robustness = _robustness(opened, walk, portions, report) if options.robustness else None
    if not len(layers[0].by_id.rows):
        notes.append(
            f"No token id has {options.least} assignments in this text: nothing can be said about ids; raise --tokens "
            "or lower --least."
        )
    history = _history(opened, portions, keys, layers, options, notes, report)
    config = opened.config.model
    model = (
        f"{config.num_layers} layers of width {config.d_model}, {config.moe.num_experts} experts, router "
        f"{config.moe.router.name} with {config.moe.router.experts_per_token} per token"
    )
    return Found(
        place or run_dir,
        opened.checkpoint.path.name,
        opened.checkpoint.meta.step,
        model,
        options,
        keys,
        sum(portion.batch.token_BS.size for portion in portions),
        _capacity_of(opened, options.batch_size),
        layers,
        robustness,
        history,
        notes,
    )


def _portions(
    opened: Opened,
    options: Options,
    texts: Sequence[str],
    notes: list[str],
    report: Callable[[str], None],
) -> list[Portion]:
    if texts:
        found, left_out = file_portions(texts, opened.tokenizer, opened.config, options.tokens, options.batch_size)
        notes += left_out
        return found
    return held_out_portions(opened.config, opened.tokenizer, options.tokens, options.batch_size, report)


def _history(
    opened: Opened,
    portions: Sequence[Portion],
    keys: Keys,
    layers: Sequence[LayerFound],
    options: Options,
    notes: list[str],
    report: Callable[[str], None],
) -> list[Earlier]:
    """The earlier checkpoints and the last, whose overlap with itself is 1."""
    least, found = options.least, list[Earlier]()
    for path in opened.earlier:
        try:
            checkpoint = opened.open_earlier(path)
        except CheckpointError as error:
            notes.append(f"Not compared: {error}")
            continue
        overlaps, shapes, drops = [], [], []
        for layer, last in zip(opened.walk(portions, checkpoint, report=report), layers, strict=True):
            counts = count(layer, keys)
            overlaps.append(overlap(last.counts.id_XE, counts.id_XE, least))
            shapes.append(geometry(layer))
            drops.append(counts.drop_rate)
        found.append(Earlier(checkpoint.meta.step, overlaps, shapes, drops))
    if not found:
        return []
    ones = [overlap(each.counts.id_XE, each.counts.id_XE, least) for each in layers]
    shapes, drops = [each.geometry for each in layers], [each.counts.drop_rate for each in layers]
    return [*found, Earlier(opened.checkpoint.meta.step, ones, shapes, drops)]


def bounds_of(layer: Layer, shape: Geometry) -> Bounds | None:
    """Capacities by LocMoE's theory; None for a router without gate rows."""
    if not layer.moe.config.router.has_gate_rows:
        return None
    dim, experts = layer.moe.router.gate_dim, layer.num_experts
    return Bounds(
        lower_bound(shape.mean_cosine, dim, experts, probability="independent"),
        delta_max_bound(shape.largest_cosine, dim, experts),
    )


def _robustness(
    opened: Opened, walk: Walk, portions: Sequence[Portion], report: Callable[[str], None]
) -> Robustness | None:
    if opened.config.model.moe.router.looks_ahead:
        return None
    without = opened.walk(portions, without_first_choice=True, report=report)
    for _ in without:
        pass
    return Robustness(float(walk.nats().mean()), float(without.nats().mean()))


def _top_ids(count_XE: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> list[list[TopId]]:
    """For each expert, the ids of `rows` of which it gets the largest shares; equal shares by frequency."""
    total_X = count_XE.sum(1)
    found = []
    for count_X in count_XE.T:
        share_R = count_X[rows] / total_X[rows]
        best = [row for row in np.lexsort((-total_X[rows], -share_R)) if share_R[row] > 0]
        found.append([TopId(names[rows[i]], float(share_R[i]), int(total_X[rows[i]])) for i in best[:TOP_IDS]])
    return found


def _capacity_of(opened: Opened, batch_size: int) -> str:
    """A line that says what was dropped by which rule."""
    capacity = opened.config.model.moe.capacity
    if not capacity.has_limit:
        return "no capacity: nothing is dropped"
    together = "each sequence by itself" if batch_size == 1 else f"{batch_size} sequences at a time"
    return f"capacity policy {capacity.policy}, factor {capacity.factor:g}, drop by {capacity.drop}; {together}"
