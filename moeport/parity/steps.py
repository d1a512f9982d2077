"""Optimiser steps of a subject, done by the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

DETAILED = 2
"""Steps of which the optimiser's work is kept: in the first, the bias correction cancels what the second shows."""


@dataclass
class OptimizerStep:
    """What the optimiser received, kept and changed in one step: whole arrays by name."""

    gradients: dict[str, np.ndarray]
    """Of the trained parameters, before clipping."""
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    """`exp_avg.NAME` and `exp_avg_sq.NAME`, or what another optimiser keeps, after the step."""
    updates: dict[str, tuple[np.ndarray, str]] = field(default_factory=dict)
    """Changes of parameters in float64, with the type of the parameter."""
    state: dict[str, np.ndarray] = field(default_factory=dict)
    """Untrained parameters that routers and capacities update, after the step."""


@dataclass
class Trained:
    """Results of optimiser steps, and this rank's loss terms of the first."""

    terms: list[LossTerms] = field(default_factory=list)
    steps: list[OptimizerStep] = field(default_factory=list)
    """The first steps, at most DETAILED."""
    trajectory: list[Step] = field(default_factory=list)
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


@dataclass(frozen=True)
class Replay:
    """Routing that the first step follows."""

    recorder: Recorder
    """That of the model; it passes decisions on, and what it records is dropped."""
    decisions: Sequence[Mapping[str, np.ndarray]]
    """For each of this rank's micro-batches, decisions by name."""


def train(
    subject: Subject, recorder: Recorder, lm: Transformer, steps: int, replay: Replay | None = None
) -> Trained | None:
    """Do at least one optimiser step with the trainer, the first under the recorder; None if the backend does not
    train.

    Args:
        subject: what to train.
        recorder: is stopped after the first step.
        lm: the model; recorded if the recorder, or that of the replay, is to see the first step.
        steps: number of steps.
        replay: routing of the first step; None: the model's own.
    """
    backend, config, mesh = subject.backend, subject.config, subject.mesh
    if not backend.trains:
        return None
    placed = place_model(config, backend, lm, subject.params, mesh, subject.all_to_all)
    model = placed.arrays
    out = Trained()
    observed = _Observed(model, out, replay)
    before = model.parameters()
    trainer = Trainer(config, replace(placed, arrays=cast(TrainingModel, observed)), subject.batches(lm))
    for number in range(max(steps, 1)):
        try:
            metrics = trainer.step()
        except NonFiniteError:
            lr = learning_rate(config.optimizer, number, config.training.steps)
            out.trajectory.append(observed.failed_step(number, mesh.world, lr))
            out.stopped = Stopped(number, observed.updates, model.parameters())
            break
        finally:
            recorder.stop()
        if observed.updates <= DETAILED:
            before = _complete(out.steps[-1], model, before, trainer.router_state)
        out.trajectory.append(
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
    if out.stopped is None and not all(np.isfinite(value).all() for value in last.values()):
        out.stopped = Stopped(len(out.trajectory), observed.updates, last)
    return out


def _complete(
    step: OptimizerStep, model: TrainingModel, before: Mapping[str, np.ndarray], router_state: Sequence[str]
) -> dict[str, np.ndarray]:
    """Add what a step changed, given the parameters before it; returns those after it."""
    after = model.parameters()
    step.moments = model.optimizer_state()
    step.state = {name: after[name] for name in router_state}
    step.updates = {
        name: (value.astype(np.float64) - before[name], str(value.dtype))
        for name, value in after.items()
        if name not in step.state
    }
    return after


class _Observed:
    """A training model that exposes the loss terms of its first step, and the gradients of its first steps."""

    def __init__(self, model: TrainingModel, out: Trained, replay: Replay | None):
        self._model, self._out, self._replay = model, out, replay
        self.updates = 0
        """Number of times that the optimiser has changed the parameters."""
        self._terms: list[LossTerms] = []
        self._norm: Array | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        """Also keeps the loss terms of the first step, and makes it follow a replay."""
        if self._replay and not self.updates:
            self._replay.recorder.take()
            self._replay.recorder.follow(self._replay.decisions[len(self._terms)])
        terms = self._model.accumulate(batch, share, is_last)
        self._terms.append(terms)
        if not self.updates:
            self._out.terms.append(terms)
        return terms

    def gradient_norm(self) -> Array:
        """Also keeps the gradients of the first steps."""
        self._norm = self._model.gradient_norm()
        if self.updates < DETAILED:
            self._out.steps.append(OptimizerStep(self._model.gradients()))
        return self._norm

    def step(self, learning_rate: float, norm: Array) -> None:
        """Also counts."""
        if self._replay:
            self._replay.recorder.stop()
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
