"""Code with a fault outside the operations, for the table of planted faults: each returns a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

import moeport.model.capacity
import moeport.model.moe
import moeport.training.trainer
from moeport.backends.torch.model import TorchTrainingModel
from moeport.backends.torch.optimizer import AdamW
from moeport.core.losses import load_balance_loss, z_loss
from moeport.data import Sampler
from moeport.model.moe import MoELayer
from moeport.routers.sigmoid_bias import SigmoidBiasRouter
from moeport.training.batches import Batches

Patch = Callable[[], AbstractContextManager[object]]

# ---------------------------------------------------------------------- losses and dispatch


def auxiliary_loss_times(factor: float) -> Patch:
    real = MoELayer.auxiliary_loss

    def loss(self, ops, metrics):
        loss = real(self, ops, metrics)
        return loss * ops.constant_like(factor, loss)

    return lambda: mock.patch.object(MoELayer, "auxiliary_loss", loss)


def balance_per_sequence():
    def loss(ops, routing, sequences, *args):
        return load_balance_loss(ops, routing, 2, *args)

    return mock.patch.object(moeport.model.moe, "load_balance_loss", loss)


def balance_not_times_experts():
    def loss(ops, routing, *args):
        balance = load_balance_loss(ops, routing, *args)
        return balance * ops.constant_like(1 / routing.num_experts, balance)

    return mock.patch.object(moeport.model.moe, "load_balance_loss", loss)


def no_z_loss():
    def loss(ops, log_partition_T):
        z = z_loss(ops, log_partition_T)
        return z * ops.constant_like(0.0, z)

    return mock.patch.object(moeport.model.moe, "z_loss", loss)


def capacity_plus_one():
    real = moeport.model.capacity.factor_bound
    return mock.patch.object(moeport.model.capacity, "factor_bound", lambda *args: real(*args) + 1)


def last_come_first_served():
    """Drops the first assignments of an expert in place of the last."""
    real = moeport.model.moe.drop_overflow

    def drop(ops, routing, capacity, policy, noise=()):
        flipped = replace(routing, expert_N=routing.expert_N.flip(0), weight_N=routing.weight_N.flip(0))
        served: Any = real(ops, flipped, capacity, policy, noise)
        return replace(routing, expert_N=served.expert_N.flip(0), weight_N=served.weight_N.flip(0))

    return mock.patch.object(moeport.model.moe, "drop_overflow", drop)


# ---------------------------------------------------------------------- the optimiser


def optimizer_with(**keys: object) -> Patch:
    """Other settings than those of the config."""
    real = AdamW.__init__

    def init(self, module, specs, config, *rest):
        real(self, module, specs, config.model_copy(update=keys), *rest)

    return lambda: mock.patch.object(AdamW, "__init__", init)


def decay_on_norms():
    real = AdamW.__init__

    def init(self, module, specs, config, *rest):
        real(self, module, specs, config, *rest)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = config.weight_decay

    return mock.patch.object(AdamW, "__init__", init)


def around_step(
    before: Callable[[AdamW], object] = lambda optimizer: None,
    after: Callable[[AdamW], object] = lambda optimizer: None,
    rate: float = 1.0,
) -> Patch:
    """Something done before and after each step, and another learning rate."""
    real = AdamW.step

    def step(self, learning_rate, norm):
        with torch.no_grad():
            before(self)
            real(self, learning_rate * rate, norm)
            after(self)

    return lambda: mock.patch.object(AdamW, "step", step)


def forget_moments(optimizer):
    optimizer.optimizer.state.clear()


def round_moments(optimizer):
    for state in optimizer.optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].copy_(state[moment].bfloat16().float())


def round_weights(optimizer):
    for p in optimizer.parameters.values():
        p.copy_(p.bfloat16().float())


def one_expert_without_gradient(optimizer):
    for name, p in optimizer.parameters.items():
        if ".experts." in name:
            p.grad[3] = 0


def decay_in_the_gradient(optimizer):
    """L2 regularisation in place of decoupled decay."""
    for name, p in optimizer.parameters.items():
        if optimizer.specs[name].decays:
            p.grad.add_(p, alpha=optimizer.config.weight_decay)


def gradients_of(part: str, factor: float) -> Patch:
    """Gradients of some parameters times a factor, before their norm is taken."""
    real = AdamW.gradient_norm

    def norm(self):
        for name, p in self.parameters.items():
            if part in name:
                p.grad.mul_(factor)
        return real(self)

    return lambda: mock.patch.object(AdamW, "gradient_norm", norm)


def next_rate():
    """The learning rate of the step after."""
    real = moeport.training.trainer.learning_rate
    return mock.patch.object(moeport.training.trainer, "learning_rate", lambda c, step, total: real(c, step + 1, total))


@contextmanager
def nan_in_a_weight_after_step_1() -> Iterator[None]:
    def spoil(optimizer):
        optimizer.parameters["layers.1.attention.q"][0, 0] = float("nan")

    with around_step(after=spoil)():
        yield


# ---------------------------------------------------------------------- data and ranks


def sequences(change: Callable[[np.ndarray], np.ndarray], step_of: Callable[[int], int] = lambda step: step) -> Patch:
    """Other sequences in a batch, or batches in another order."""
    real = Sampler.indices
    return lambda: mock.patch.object(Sampler, "indices", lambda self, step: change(real(self, step_of(step))))


def tokens(change: Callable[[np.ndarray], np.ndarray], targets: bool = True) -> Patch:
    """Other tokens, and the same change of the targets."""
    real = Batches.of_step

    def of_step(self, step):
        for batch in real(self, step):
            target_BS = change(batch.target_BS) if targets else batch.target_BS
            yield replace(batch, token_BS=change(batch.token_BS), target_BS=target_BS)

    return lambda: mock.patch.object(Batches, "of_step", of_step)


def share_of_one():
    """Gradients of micro-batches are added, not averaged."""
    real = TorchTrainingModel.accumulate
    return mock.patch.object(
        TorchTrainingModel, "accumulate", lambda self, batch, share, is_last=True: real(self, batch, 1.0, is_last)
    )


def last_micro_batch_twice():
    real = TorchTrainingModel.accumulate
    last: list = []

    def accumulate(self, batch, share, is_last=True):
        last.append(batch)
        return real(self, last[-2] if len(last) % 2 == 0 else batch, share, is_last)

    return mock.patch.object(TorchTrainingModel, "accumulate", accumulate)


def bias_not_moved():
    return mock.patch.object(SigmoidBiasRouter, "update_state", return_value={})


def bias_moved_the_other_way():
    real = SigmoidBiasRouter.update_state

    def update(self, state, load_E):
        return {name: 2 * state[name] - value for name, value in real(self, state, load_E).items()}

    return mock.patch.object(SigmoidBiasRouter, "update_state", update)
