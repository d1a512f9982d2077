"""Measures cosines of tokens and gate rows on a run's last checkpoint, and the capacity bounds derived from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import Backend
from moeport.comm.single import SingleProcess
from moeport.config.capacity_rules import MOST_GIVEN_UP
from moeport.config.model import CapacityConfig
from moeport.config.schema import Config
from moeport.core.bounds import FORMS, controller_bound, lower_bound, rivals_bound
from moeport.errors import MoeportError
from moeport.model.build import build_model
from moeport.model.capacity import Estimate, estimate_from
from moeport.model.transformer import Transformer
from moeport.training.batches import Batches
from moeport.training.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from moeport.training.fits import check_parameters, finite
from moeport.training.run_dir import CHECKPOINT_DIR, config_of
from moeport.training.task import Task, build_task

LOW = "low quantile"
ESTIMATORS: dict[str, dict[str, Any]] = {
    "minimum": {"delta": "minimum"},
    LOW: {"delta": "quantile", "quantile": 0.1},
    "mean": {"delta": "mean"},
    "quantile": {"delta": "quantile", "quantile": 0.9},
    "maximum": {"delta": "maximum"},
}
"""Estimators of delta that are shown, by name, with their options; the quantile of the config, if it has one, takes the
place of the low or the high one."""
KEEPING = ("minimum", LOW)
"""Those of tokens that an expert is to keep; for others, the rules that count rivals say nothing."""
RIVALS, CONTROLLER = "kept + rivals", "2 s q"
"""Names of the capacities of the rules `rivals` and `controller`."""
PROBABILITIES = ("paper", "independent")


def estimators(capacity: CapacityConfig) -> dict[str, dict[str, Any]]:
    """The options of each estimator of delta, by name."""
    shown = {name: dict(options) for name, options in ESTIMATORS.items()}
    if capacity.quantile is not None:
        shown[_quantile_name(capacity.quantile)]["quantile"] = capacity.quantile
    return shown


def estimator_of(capacity: CapacityConfig) -> str:
    """The name of the estimator of a config."""
    quantile = capacity.estimator == "quantile"
    return _quantile_name(capacity.delta_quantile) if quantile else capacity.estimator


def _quantile_name(quantile: float) -> str:
    return LOW if quantile <= MOST_GIVEN_UP else "quantile"


@dataclass(frozen=True)
class Measurement:
    """Cosines of tokens and gate rows in one layer, and the bounds derived from them."""

    estimates: dict[str, Estimate]
    """Estimates by the estimator of delta."""
    bounds: dict[str, dict[str, float]]
    """Capacities by estimator and form, neither rounded nor clipped."""


def measure_cosines(run_dir: Path, config: Config, report: Callable[[str], None]) -> tuple[dict[str, Measurement], str]:
    """Measures the last checkpoint on the micro-batch that follows it.

    Returns: (measurements by layer name, the reason if there are none).
    """
    router = config.model.moe.router
    if not router.has_gate_rows:
        return {}, f"No bounds: router {router.name} has no gate row for each expert."
    try:
        checkpoint = finite(open_checkpoint(find_checkpoint(run_dir / CHECKPOINT_DIR, "latest")))
        config = config_of(checkpoint)
        backend = get_backend(config.backend.on_any_device().model_copy(update={"compile": None}))
        task = build_task(config, report=report)
        check_parameters(checkpoint, task.model().parameter_specs())
    except MoeportError as error:
        return {}, f"No bounds: {error}"
    names, found = config.model.moe_layer_names, dict[str, Measurement]()
    for estimator, options in estimators(config.model.moe.capacity).items():
        measuring = _measuring(config, options)
        lm = build_model(measuring.model, measuring.data, task.vocab_size)
        affinity_L4E = _statistics(measuring, backend, lm, task, checkpoint)
        moe_layers = [moe for block in lm.blocks for moe in block.moe.values()]
        for name, moe, affinity_4E in zip(names, moe_layers, affinity_L4E, strict=True):
            estimate = estimate_from(affinity_4E)
            if estimate:
                known = found.setdefault(name, Measurement({}, {}))
                known.estimates[estimator] = estimate
                bounds = _bounds(config.model.moe.capacity, estimate, moe.router.gate_dim, moe.config.num_experts)
                known.bounds[estimator] = bounds | _counts(estimator, estimate)
    return found, ""


def _bounds(config: CapacityConfig, estimate: Estimate, dim: int, experts: int) -> dict[str, float]:
    """All forms of the bound at one estimate."""
    found = {
        f"{form}, {probability}": lower_bound(estimate.delta, dim, experts, form, probability)
        for form in FORMS[:2]
        for probability in PROBABILITIES
    }
    found[FORMS[2]] = lower_bound(estimate.delta, dim, experts, FORMS[2])
    found[f"success {1 - config.failure:.0%}"] = lower_bound(
        estimate.delta, dim, experts, probability="independent", failure=config.failure
    )
    return found


def _counts(estimator: str, estimate: Estimate) -> dict[str, float]:
    """The capacities that count rivals; NaN at a delta that is not of tokens to be kept."""
    if estimator not in KEEPING:
        return {RIVALS: math.nan, CONTROLLER: math.nan}
    return {RIVALS: rivals_bound(estimate.kept, estimate.rivals), CONTROLLER: controller_bound(estimate.rivals)}


def _measuring(config: Config, options: dict[str, Any]) -> Config:
    """The same config with a capacity that estimates delta, and drops what the run drops."""
    moe = config.model.moe
    update = dict(options)
    if not moe.capacity.is_estimated:  # until there is an estimate, the factor applies
        factor = moe.capacity.factor if moe.capacity.policy == "factor" else float(moe.num_experts)
        update |= {"policy": "locmoe", "factor": factor}
    moe = moe.model_copy(update={"capacity": moe.capacity.model_copy(update=update)})
    return config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})


def _statistics(config: Config, backend: Backend, lm: Transformer, task: Task, checkpoint: Checkpoint) -> np.ndarray:
    """`affinity_L4E` of the first micro-batch after a checkpoint."""
    ops = backend.ops
    batches = Batches(config.training, lm, task.train, SingleProcess(ops), task.first_token, task.denoising)
    batch = next(batches.of_step(checkpoint.meta.step))
    untrained = [spec for spec in lm.parameter_specs() if not spec.trainable]
    values = {spec.name: np.zeros(spec.shape, np.float32) for spec in untrained} | dict(checkpoint.model)
    params = {name: ops.from_numpy(value.astype(backend.parameter_dtype)) for name, value in values.items()}
    placed = batch.mapped(ops.from_numpy)
    run = lm.forward_pass(ops, batch.token_BS.shape[1], backend.dtype, training=True)
    return ops.to_numpy(lm.loss(run, params, placed).affinity_L4E)
