"""The training loop, the same for every backend."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from moeport.backends.base import Backend, TrainingModel
from moeport.comm.exchange import CountedExchange
from moeport.comm.mesh import Mesh, alone
from moeport.config.schema import Config
from moeport.data import Examples, Sampler
from moeport.errors import NonFiniteError
from moeport.model.capacity import estimate_of
from moeport.model.transformer import COUNTS, Batch, LossTerms, Transformer
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
        train: what it trains on.
        start_step: steps already done.
        peak_flops: FLOP/s of one rank's device that the MFU refers to.
        mesh: the ranks that train together, each with the same other arguments; default: this process alone.
        exchanges: what carries tokens to experts on other ranks, of each MoE layer; empty where there are none.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        lm: Transformer,
        model: TrainingModel,
        train: Examples,
        start_step: int,
        peak_flops: float,
        mesh: Mesh | None = None,
        exchanges: Mapping[str, CountedExchange] = MappingProxyType({}),
    ):
        self.config, self.backend, self.lm, self.model, self.train = config, backend, lm, model, train
        self.step_number = start_step
        self.mesh, self.exchanges = mesh or alone(backend.ops), exchanges
        self.peak_flops = peak_flops * self.mesh.world.size
        self.sampler = Sampler(train.num_sequences, config.training.batch_size, config.training.seed)
        self.router_state = lm.router_state_names()
        self.tokens_per_step = config.training.batch_size * train.sequence_length
        self.flops_per_token = lm.training_flops_per_token(train.sequence_length)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's part of the batch of `step` (from 0), cut into micro-batches."""
        training, world = self.config.training, self.mesh.world
        token_BS, target_BS = self.train.batch(self.sampler.rank_indices(step, world.rank, world.size))
        noise = self.lm.noise(training.batch_size, self.train.sequence_length, training.seed, step)
        first = training.batch_size * world.rank // world.size
        size = len(token_BS) // training.gradient_accumulation
        for start in range(0, len(token_BS), size):
            rows = slice(start, start + size)
            own = slice(first + start, first + start + size)
            yield Batch(token_BS[rows], target_BS[rows], {name: u[own] for name, u in noise.items()})

    def step(self) -> StepMetrics:
        """One optimiser step.

        Raises NonFiniteError, before parameters change, if the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        step, training = self.step_number, self.config.training
        for exchange in self.exchanges.values():
            exchange.forget()
        share = 1.0 / (training.gradient_accumulation * self.mesh.world.size)
        parts: list[LossTerms] = []
        for number, batch in enumerate(self.micro_batches(step), start=1):
            parts.append(self.model.accumulate(batch, share, number == training.gradient_accumulation))
        norm = self.model.gradient_norm()
        terms = self._whole_step(parts)
        grad_norm = float(self.backend.ops.to_numpy(norm))
        loss, total = float(terms.cross_entropy), float(terms.loss)
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            self._stop(step, total, grad_norm)
        lr = learning_rate(self.config.optimizer, step, training.steps)
        self.model.step(lr, norm)
        chosen_LE, served_LE, affinity_L3E = terms.chosen_LE, terms.served_LE, terms.affinity_L3E
        self._update_router_state(chosen_LE, affinity_L3E)
        self.step_number += 1
        seconds = time.perf_counter() - started
        tokens_per_second = self.tokens_per_step / seconds
        chosen_L = chosen_LE.sum(1)
        capacity = self.config.model.moe.capacity
        estimates = [estimate_of(affinity_3E) for affinity_3E in affinity_L3E] if capacity.is_estimated else []
        chosen_P, dropped_P = terms.positions_L2P.sum(0)
        sent_L4, exchange_time = self._sent()
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
            load_balance=float(terms.load_balance),
            router_z=float(terms.router_z),
            output_z=float(terms.output_z),
            imbalance=float(_ratio(chosen_LE.max(1) * chosen_LE.shape[1], chosen_L, 1.0).mean()),
            drop_rate=float(_ratio(chosen_LE.sum() - served_LE.sum(), chosen_LE.sum())),
            expert_load=[[round(float(x), 6) for x in row] for row in _ratio(chosen_LE, chosen_L[:, None])],
            drop_rate_per_layer=[round(float(x), 6) for x in _ratio(chosen_L - served_LE.sum(1), chosen_L)],
            assignments_per_layer=[int(x) for x in chosen_L],
            capacity_per_layer=[int(x) for x in terms.capacity_L] if terms.capacity_L.any() else [],
            delta_per_layer=[math.nan if e is None else round(e.delta, 6) for e in estimates],
            competitors_per_layer=[math.nan if e is None else round(e.competitors, 3) for e in estimates],
            drop_rate_by_position=[round(float(x), 6) for x in _ratio(dropped_P, chosen_P)] if chosen_P.any() else [],
            exchange_time=exchange_time,
            exchanged_rows_per_layer=[[int(x) for x in row] for row in sent_L4[:, :2]],
            exchanged_bytes_per_layer=[[int(x) for x in row] for row in sent_L4[:, 2:]],
        )

    def _whole_step(self, parts: list[LossTerms]) -> LossTerms:
        """The terms of the step on the host, in float64: sums over micro-batches and ranks of what counts, means of the
        rest. A capacity is the same in all of them.
        """
        found = {}
        for name, values in zip(LossTerms._fields, zip(*parts, strict=True), strict=True):
            arrays = np.stack([self.backend.ops.to_numpy(value) for value in values]).astype(np.float64)
            found[name] = arrays.sum(0) if name in COUNTS else arrays.mean(0)
        world = self.mesh.world
        if world.size > 1:
            sums = world.sum_of_numbers(np.concatenate([value.reshape(-1) for value in found.values()]))
            for (name, value), total in zip(
                found.items(), np.split(sums, np.cumsum([value.size for value in found.values()])[:-1]), strict=True
            ):
                found[name] = total.reshape(value.shape) / (1 if name in COUNTS else world.size)
        return LossTerms(**found)

    def _sent(self) -> tuple[np.ndarray, float]:
        """What all ranks sent in the exchanges of each MoE layer, (L, 4): rows inside nodes and between nodes, bytes
        inside nodes and between nodes; (0, 4) where there are no exchanges. And the seconds of all, mean of the ranks.
        """
        volumes = [exchange.sent() for exchange in self.exchanges.values()]
        own = np.array(
            [
                [v.intra_node_rows, v.inter_node_rows, v.intra_node_bytes, v.inter_node_bytes, v.seconds]
                for v in volumes
            ],
            np.float64,
        ).reshape(-1, 5)
        sent_L5 = self.mesh.world.sum_of_numbers(own) if volumes else own
        return sent_L5[:, :4], float(sent_L5[:, 4].sum()) / self.mesh.world.size

    def _update_router_state(self, chosen_LE: np.ndarray, affinity_L3E: np.ndarray) -> None:
        if self.router_state:
            state = self.model.parameters(self.router_state)
            self.model.load_parameters(self.lm.updated_state(state, chosen_LE, affinity_L3E))

    def _stop(self, step: int, loss: float, grad_norm: float) -> None:
        named = "loss or gradient norm"
        if self.mesh.world.size == 1:  # looking for it runs the model, which several ranks could only do in step
            named = next(filter(None, map(self.model.first_non_finite, self.micro_batches(step))), "gradient norm")
        raise NonFiniteError(
            f"step {step + 1}: {named} is not finite (loss {loss}, gradient norm {grad_norm}); the parameters were not "
            "updated. Lower optimizer.learning_rate, lengthen optimizer.schedule.warmup_steps, or set "
            "model.moe.router_z_loss, then start again or --resume from the last checkpoint"
        )


def _ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """part / whole, and `empty` where the whole is 0: a layer whose tokens all chose null experts is balanced."""
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)
