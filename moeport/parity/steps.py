"""Optimiser steps of a subject, done by the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from moeport.backends.base import TrainingModel
from moeport.comm.communicator import Communicator
from moeport.core.array import Array
from moeport.errors import NonFiniteError
from moeport.model.batch import Batch
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer
from moeport.parity.recorder import Recorder
from moeport.parity.recording import Step
from moeport.parity.subject import Subject
from moeport.training.placed import place_model
from moeport.training.reduction import whole_step
from moeport.training.schedule import learning_rate
from moeport.training.trainer import Trainer


@dataclass
class Trained:
    """Results of optimiser steps; of the first step also this rank's loss terms, and whole gradients and updates."""

    terms: list[LossTerms]
    gradients: dict[str, np.ndarray]
    updates: dict[str, tuple[np.ndarray, str]]
    """Updates in float64, with the type of the parameter."""
    trajectory: list[Step]
    stopped: Stopped | None = None
    """Where the steps ended early, or with parameters that are not finite."""


@dataclass(frozen=True)
class Stopped:
    """The step that could not be done, or what the last one left."""

    step: int
    """Its number, counted from 0."""
    updates: int
    """Number of times that the optimiser has changed the parameters."""
    parameters: dict[str, np.ndarray]
    """Whole parameters after these."""


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
    updates, trajectory, stopped = dict[str, tuple[np.ndarray, str]](), list[Step](), None
    for number in range(max(steps, 1)):
        try:
            metrics = trainer.step()
        except NonFiniteError:
            trajectory.append(
                observed.failed_step(number, mesh.world, learning_rate(config.optimizer, number, config.training.steps))
            )
            stopped = Stopped(number, observed.updates, model.parameters())
            break
        finally:
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
    last = model.parameters()
    if stopped is None and not all(np.isfinite(value).all() for value in last.values()):
        stopped = Stopped(len(trajectory), observed.updates, last)
    return Trained(observed.terms_seen, observed.gradients_seen, updates, trajectory, stopped)


class _Observed:
    """A training model that exposes the loss terms and the gradients of its first step."""

    def __init__(self, model: TrainingModel):
        self._model = model
        self.gradients_seen: dict[str, np.ndarray] = {}
        self.terms_seen: list[LossTerms] = []
        self.updates = 0
        self._terms: list[LossTerms] = []
        self._norm: Array | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        """Also keeps the loss terms of the first step."""
        terms = self._model.accumulate(batch, share, is_last)
        self._terms.append(terms)
        if not self.gradients_seen:
            self.terms_seen.append(terms)
        return terms

    def gradient_norm(self) -> Array:
        """Also keeps the gradients of the first step."""
        self._norm = self._model.gradient_norm()
        if not self.gradients_seen:
            self.gradients_seen = self._model.gradients()
        return self._norm

    def step(self, learning_rate: float, norm: Array) -> None:
        """Also counts."""
        self._model.step(learning_rate, norm)
        self.updates += 1
        self._terms.clear()

    def failed_step(self, number: int, world: Communicator, lr: float) -> Step:
        """What is known of a step, counted from 0, that the trainer refused. Every rank calls it."""
        norm = math.nan if self._norm is None else float(world.ops.to_numpy(self._norm))
        if not self._terms:
            return Step(number + 1, math.nan, math.nan, norm, math.nan, math.nan, lr, [])
        terms = whole_step(world, self._terms)
        chosen_LE = np.nan_to_num(terms.chosen_LE)
        load_LE = chosen_LE / np.maximum(chosen_LE.sum(1, keepdims=True), 1)
        return Step(
            step=number + 1,
            loss=float(terms.cross_entropy),
            total_loss=float(terms.loss),
            grad_norm=norm,
            load_balance=float(terms.load_balance),
            router_z=float(terms.router_z),
            lr=lr,
            expert_load=load_LE.tolist(),
        )
