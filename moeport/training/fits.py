"""Holds the arrays of a checkpoint against a model before anything is loaded: names, shapes, types and values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeport.core.muon import moment_names
from moeport.core.parameters import ParameterSpec
from moeport.errors import CheckpointError
from moeport.training.checkpoint import Checkpoint
from moeport.training.checkpoint_meta import OPTIMIZER_FILE

DTYPES = ("float32", "float64")
"""Types that parameters and moments are stored in."""


def check_parameters(checkpoint: Checkpoint, specs: list[ParameterSpec]) -> None:
    """Refuse a checkpoint whose parameters and router state are not exactly those of the model.

    Raises CheckpointError.
    """
    faults = _faults(checkpoint.model, {spec.name: spec.shape for spec in specs})
    if faults:
        raise CheckpointError(f"{checkpoint.path}: does not fit the model of the config: {_shown(faults)}")


def check_optimizer(checkpoint: Checkpoint, specs: list[ParameterSpec], updates: int, name: str = "adamw") -> None:
    """Refuse a checkpoint whose optimiser state is not exactly that of the model.

    Args:
        checkpoint: it has passed `check_parameters`.
        specs: the parameters of the model.
        updates: number of times that the parameters were updated; before the first one there is no state.
        name: `optimizer.name`.

    Raises CheckpointError.
    """
    shapes = {moment: spec.shape for moment, spec in moment_names(specs, name).items()}
    faults = _faults(checkpoint.optimizer, shapes if updates else {})
    if faults:
        raise CheckpointError(
            f"{checkpoint.path / OPTIMIZER_FILE}: does not fit the model of the config: {_shown(faults)}; "
            "use another checkpoint"
        )


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a run that had diverged: it would give NaN for ever.

    Raises CheckpointError, which names the first array at fault.
    """
    name = non_finite(checkpoint.model) or non_finite(checkpoint.optimizer)
    if name:
        raise CheckpointError(
            f"{checkpoint.path}: {name} holds a NaN or an infinity: the run had diverged; use an earlier checkpoint"
        )


def non_finite(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Name of the first array with a NaN or an infinity; None if there is none."""
    return next((name for name, value in arrays.items() if not np.isfinite(value).all()), None)


def _faults(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with arrays that should have these names and shapes, sorted by name."""
    faults = [f"{name}: missing" for name in shapes.keys() - arrays.keys()]
    faults += [f"{name}: not in this model" for name in arrays.keys() - shapes.keys()]
    for name in shapes.keys() & arrays.keys():
        value, shape = arrays[name], shapes[name]
        if value.shape != shape:
            faults.append(f"{name}: shape {value.shape}, expected {shape}")
        elif value.dtype.name not in DTYPES:
            faults.append(f"{name}: {value.dtype.name}, expected {' or '.join(DTYPES)}")
    return sorted(faults)


def _shown(faults: list[str]) -> str:
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
