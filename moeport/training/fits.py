"""Holds the arrays of a checkpoint against a model before anything is loaded: names, shapes, types and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from typing_extensions import override

from moeport.core.moments import moment_names
from moeport.core.parameters import ParameterSpec, is_expert
from moeport.core.weights import Box, Wrapped, dtype_of, read_part, shape_of
from moeport.errors import CheckpointError
from moeport.training.checkpoint import Checkpoint
from moeport.training.checkpoint_index import blocks

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
            f"{checkpoint.path}: the optimiser's state does not fit the model of the config: {_shown(faults)}; "
            "use another checkpoint"
        )


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a run that had diverged: it would give NaN for ever.

    Raises CheckpointError, which names the first array at fault.
    """
    name = non_finite(checkpoint.model) or non_finite(checkpoint.optimizer)
    if name:
        raise _diverged(checkpoint, name)


def finite(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, of which what is read is checked as `check_finite` does, by the rank that reads it."""
    model, optimizer = (_Finite(checkpoint, arrays) for arrays in (checkpoint.model, checkpoint.optimizer))
    return replace(checkpoint, model=model, optimizer=optimizer)


class _Finite(Wrapped):
    """Arrays of a checkpoint; a NaN or an infinity that is read is an error."""

    def __init__(self, checkpoint: Checkpoint, arrays: Mapping[str, np.ndarray]):
        super().__init__(arrays)
        self._checkpoint = checkpoint

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        values = super().read(name, box)
        if not is_finite(values):
            raise _diverged(self._checkpoint, name)
        return values


def _diverged(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {name} holds a NaN or an infinity: the run had diverged; use an earlier checkpoint"
    )


def non_finite(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Name of the first array with a NaN or an infinity; None if there is none. It reads a block at a time."""
    for name in arrays:
        for block in blocks(Box.whole(shape_of(arrays, name)), is_expert(name)):
            if not np.isfinite(read_part(arrays, name, block)).all():
                return name
    return None


def is_finite(values: np.ndarray) -> bool:
    """Whether an array has no NaN and no infinity; a block at a time, so that it takes no memory."""
    return all(np.isfinite(values[block.slices]).all() for block in blocks(Box.whole(values.shape), by_row=False))


def _faults(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with arrays that should have these names and shapes, sorted by name."""
    faults = [f"{name}: missing" for name in shapes.keys() - arrays.keys()]
    faults += [f"{name}: not in this model" for name in arrays.keys() - shapes.keys()]
    for name in shapes.keys() & arrays.keys():
        found, shape = shape_of(arrays, name), shapes[name]
        if found != shape:
            faults.append(f"{name}: shape {found}, expected {shape}")
        elif (dtype := dtype_of(arrays, name)) not in DTYPES:
            faults.append(f"{name}: {dtype}, expected {' or '.join(DTYPES)}")
    return sorted(faults)


def _shown(faults: list[str]) -> str:
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
