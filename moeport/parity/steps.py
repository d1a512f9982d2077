"""Optimiser steps of a subject, done by the trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from moeport.backends.base import TrainingModel
from moeport.core.array import Array
from moeport.model.batch import Batch
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer
from moeport.parity.recorder import Recorder
from moeport.parity.recording import Step
from moeport.parity.subject import Subject
from moeport.training.placed import place_model
from moeport.training.trainer import Trainer


@dataclass
class Trained:
    """Results of optimiser steps; of the first step also this rank's loss terms, and whole gradients and updates."""

    terms: list[LossTerms]
    gradients: dict[str, np.ndarray]
    updates: dict[str, tuple[np.ndarray, str]]
    """Updates in float64, with the type of the parameter."""
    trajectory: list[Step]


def train(subject: Subject, recorder: Recorder, lm: Transformer, steps: int) -> Trained | None:
    """Do at least one optimiser step with the trainer, the first under the recorder; None if the backend does not
    train.
    """
    backend, config, mesh = subject.backend, subject.config, subject.mesh
    if not backend.trains:
        return None
    placed = place_model(config, backend, lm, subject.params, mesh, subject.all_to_all)
    model = placed.arrays
    observed = _Observed(model)
    before = model.parameters()
    trainer = Trainer(config, replace(placed, arrays=cast(TrainingModel, observed)), subject.batches(lm))
    updates, trajectory = dict[str, tuple[np.ndarray, str]](), []
    for number in range(max(steps, 1)):
        metrics = trainer.step()
        recorder.stop()
        if number == 0:
            updates = {
                name: (value.astype(np.float64) - before[name], str(value.dtype))
                for name, value in model.parameters().items()
            }
        trajectory.append(
            Step(
                step=metrics.step,
                loss=metrics.loss,
                total_loss=metrics.total_loss,
                grad_norm=metrics.grad_norm,
                load_balance=metrics.load_balance,
                router_z=metrics.router_z,
                lr=metrics.lr,
                expert_load=metrics.expert_load,
            )
        )
    return Trained(observed.terms_seen, observed.gradients_seen, updates, trajectory)


class _Observed:
    """A training model that exposes the loss terms and the gradients of its first step."""

    def __init__(self, model: TrainingModel):
        self._model = model
        self.gradients_seen: dict[str, np.ndarray] = {}
        self.terms_seen: list[LossTerms] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        """Also keeps the loss terms of the first step."""
        terms = self._model.accumulate(batch, share, is_last)
        if not self.gradients_seen:
            self.terms_seen.append(terms)
        return terms

    def step(self, learning_rate: float, norm: Array) -> None:
        """Also keeps the gradients of the first step."""
        if not self.gradients_seen:
            self.gradients_seen = self._model.gradients()
        self._model.step(learning_rate, norm)
