"""A model in training, on the ranks that hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeport.backends.base import Backend, TrainingModel, TrainingOptions
from moeport.comm.exchange import CountedExchange
from moeport.comm.mesh import Mesh
from moeport.config.schema import Config
from moeport.model.spread import spread
from moeport.model.transformer import Transformer


@dataclass(frozen=True)
class PlacedModel:
    """A model in training, on the ranks that hold it."""

    shapes: Transformer
    """Its shapes and forward pass."""
    arrays: TrainingModel
    """Its parameters, gradients and optimiser state on the backend."""
    mesh: Mesh
    """The ranks that train it together."""
    exchanges: Mapping[str, CountedExchange]
    """For each MoE layer, what carries tokens to experts on other ranks; empty if every rank has all experts."""


def place_model(
    config: Config,
    backend: Backend,
    shapes: Transformer,
    params: Mapping[str, np.ndarray],
    mesh: Mesh,
    all_to_all: tuple[str, int] = ("flat", 1),
) -> PlacedModel:
    """Put a model on the ranks of a mesh; every rank calls it.

    Args:
        config: the whole config.
        backend: where it runs.
        shapes: its shapes; its layers are told where their experts are.
        params: parameters by name, whole or to be read in part.
        mesh: the ranks.
        all_to_all: an algorithm in EXCHANGES, and the number of chunks; used only if ranks share the experts.
    """
    exchanges = spread(shapes, mesh, *all_to_all)
    options = TrainingOptions(
        config.optimizer,
        config.training.activation_checkpointing,
        config.backend.compile,
        config.parallelism.shard,
        config.backend.cuda_graphs,
    )
    return PlacedModel(shapes, backend.training_model(shapes, params, options, mesh), mesh, exchanges)
