"""The training loop, the same for every backend."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np

from moeport.backends.base import Backend, TrainingModel
from moeport.config.schema import Config
from moeport.core.model import Batch, DecoderLM, LossTerms
from moeport.data import PackedTokens, Sampler
from moeport.errors import NonFiniteError
from moeport.training.metrics import StepMetrics
from moeport.training.schedule import learning_rate


class Trainer:
    """Optimiser steps on one model.

    A step depends on the config, the parameters, the optimiser state and the number of the step alone: batches and
    noise are drawn by counter, so a run resumed at step n repeats what an uninterrupted one would have done.

    Args:
        config: the whole config.
        backend: where it runs.
        lm: the model's shapes.
        model: its parameters and optimiser on the backend.
        train: training tokens.
        start_step: steps already done.
        peak_flops: FLOP/s that the MFU refers to.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        lm: DecoderLM,
        model: TrainingModel,
        train: PackedTokens,
        start_step: int,
        peak_flops: float,
    ):
        self.config, self.backend, self.lm, self.model, self.train = config, backend, lm, model, train
        self.step_number = start_step
        self.peak_flops = peak_flops
        self.sampler = Sampler(train.num_sequences, config.training.batch_size, config.training.seed)
        self.router_state = lm.router_state_names()
        self.tokens_per_step = config.training.batch_size * config.data.sequence_length
        self.flops_per_token = config.model.training_flops_per_token(lm.vocab_size, config.data.sequence_length)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The batch of `step` (from 0), cut into micro-batches."""
        training = self.config.training
        token_BS, target_BS = self.train.batch(self.sampler.indices(step))
        noise = self.lm.noise(training.batch_size, self.config.data.sequence_length, training.seed, step)
        size = training.batch_size // training.gradient_accumulation
        for start in range(0, training.batch_size, size):
            rows = slice(start, start + size)
            yield Batch(token_BS[rows], target_BS[rows], {name: u[rows] for name, u in noise.items()})

    def step(self) -> StepMetrics:
        """One optimiser step.

        Raises NonFiniteError, before parameters change, if the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        step, training = self.step_number, self.config.training
        share = 1.0 / training.gradient_accumulation
        parts: list[LossTerms] = []
        for batch in self.micro_batches(step):
            parts.append(self.model.accumulate(batch, share))
        norm = self.model.gradient_norm()
        terms = LossTerms(*(self._fetch(values) for values in zip(*parts, strict=True)))
        grad_norm = float(self.backend.ops.to_numpy(norm))
        loss, total = float(terms.cross_entropy.mean()), float(terms.loss.mean())
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            self._stop(step, total, grad_norm)
        lr = learning_rate(self.config.optimizer, step, training.steps)
        self.model.step(lr, norm)
        chosen_LE, served_LE = terms.chosen_LE.sum(0), terms.served_LE.sum(0)
        self._update_router_state(chosen_LE)
        self.step_number += 1
        seconds = time.perf_counter() - started
        tokens_per_second = self.tokens_per_step / seconds
        chosen_L = chosen_LE.sum(1)
        return StepMetrics(
            step=self.step_number,
            loss=loss,
            total_loss=total,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            step_time=seconds,
            tokens=self.step_number * self.tokens_per_step,
            mfu=tokens_per_second * self.flops_per_token / self.peak_flops,
            load_balance=float(terms.load_balance.mean()),
            router_z=float(terms.router_z.mean()),
            output_z=float(terms.output_z.mean()),
            imbalance=float((chosen_LE.max(1) / chosen_LE.mean(1)).mean()),
            drop_rate=float(1 - served_LE.sum() / chosen_LE.sum()),
            expert_load=[[round(float(x), 4) for x in row] for row in chosen_LE / chosen_L[:, None]],
            drop_rate_per_layer=[round(float(x), 6) for x in 1 - served_LE.sum(1) / chosen_L],
        )

    def _fetch(self, values: tuple[object, ...]) -> np.ndarray:
        return np.stack([self.backend.ops.to_numpy(value) for value in values])

    def _update_router_state(self, chosen_LE: np.ndarray) -> None:
        if self.router_state:
            state = self.model.parameters(self.router_state)
            self.model.load_parameters(self.lm.updated_state(state, chosen_LE))

    def _stop(self, step: int, loss: float, grad_norm: float) -> None:
        named = next(filter(None, map(self.model.first_non_finite, self.micro_batches(step))), "gradient norm")
        raise NonFiniteError(
            f"step {step + 1}: {named} is not finite (loss {loss}, gradient norm {grad_norm}); the parameters were not "
            "updated. Lower optimizer.learning_rate, lengthen optimizer.schedule.warmup_steps, or set "
            "model.moe.router_z_loss, then start again or --resume from the last checkpoint"
        )
