"""The training loop, the same for every backend."""

from __future__ import annotations

import math
import time

import numpy as np

from moeport.config.schema import Config
from moeport.errors import NonFiniteError
from moeport.model.capacity import estimate_from
from moeport.model.loss_terms import LossTerms
from moeport.training.batches import Batches
from moeport.training.metrics_table import StepMetrics
from moeport.training.placed import PlacedModel
from moeport.training.reduction import measured, whole_step
from moeport.training.schedule import learning_rate


class Trainer:
    """Optimiser steps on one model.

    A step depends only on the config, the parameters, the optimiser state and the step number: batches and noise are
    drawn by counter, so a run resumed at step n does exactly what an uninterrupted one would have done.

    Args:
        config: the whole config.
        placed: the model, on the ranks that train it; all ranks pass the same values for the other arguments.
        batches: the batches it trains on.
        start_step: steps already done, including skipped ones.
        peak_flops: FLOP/s of one rank's device that the MFU refers to.
    """

    def __init__(
        self, config: Config, placed: PlacedModel, batches: Batches, start_step: int = 0, peak_flops: float = 1.0
    ):
        self.config, self.batches, self.step_number = config, batches, start_step
        self.shapes, self.model = placed.shapes, placed.arrays
        self.world, self.exchanges = placed.mesh.world, placed.exchanges
        self.peak_flops = peak_flops * self.world.size
        self.router_state = self.shapes.router_state_names()
        self.tokens_per_step = batches.tokens_per_step
        self.flops_per_token = self.shapes.training_flops_per_token(batches.examples.sequence_length)

    @property
    def updates(self) -> int:
        """Number of steps done that updated the parameters, which is all but the skipped ones."""
        return self.config.training.updates(self.step_number)

    def skip(self) -> None:
        """Pass over one step without training on its batch."""
        self.step_number += 1

    def step(self) -> StepMetrics:
        """Do one optimiser step.

        Raises NonFiniteError, before any parameter changes, if the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        step, training = self.step_number, self.config.training
        for exchange in self.exchanges.values():
            exchange.forget()
        share = 1.0 / self.batches.num_parts
        parts: list[LossTerms] = []
        for number, batch in enumerate(self.batches.of_step(step), start=1):
            parts.append(self.model.accumulate(batch, share, number == training.gradient_accumulation))
        norm = self.model.gradient_norm()
        terms = whole_step(self.world, parts)
        grad_norm = float(self.world.ops.to_numpy(norm))
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
        estimates = [estimate_from(affinity_3E) for affinity_3E in affinity_L3E] if capacity.is_estimated else []
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
            tokens=self.updates * self.tokens_per_step,
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
            **measured(terms),
        )

    def _sent(self) -> tuple[np.ndarray, float]:
        """What all ranks sent in the exchanges of each MoE layer, and the total time in seconds, mean over the ranks.

        The former is (L, 4): rows inside nodes and between nodes, then bytes inside nodes and between nodes; (0, 4)
        without exchanges.
        """
        volumes = [exchange.sent() for exchange in self.exchanges.values()]
        own = np.array(
            [
                [v.intra_node_rows, v.inter_node_rows, v.intra_node_bytes, v.inter_node_bytes, v.seconds]
                for v in volumes
            ],
            np.float64,
        ).reshape(-1, 5)
        sent_L5 = self.world.sum_of_numbers(own) if volumes else own
        return sent_L5[:, :4], float(sent_L5[:, 4].sum()) / self.world.size

    def _update_router_state(self, chosen_LE: np.ndarray, affinity_L3E: np.ndarray) -> None:
        if self.router_state:
            state = self.model.parameters(self.router_state)
            self.model.load_parameters(self.shapes.updated_state(state, chosen_LE, affinity_L3E))

    def _stop(self, step: int, loss: float, grad_norm: float) -> None:
        named = "loss or gradient norm"
        if self.world.size == 1:  # the search runs the model, which several ranks could only do together
            named = next(filter(None, map(self.model.first_non_finite, self.batches.of_step(step))), "gradient norm")
        raise NonFiniteError(
            f"step {step + 1}: {named} is not finite (loss {loss}, gradient norm {grad_norm}); the parameters were not "
            "updated"
        )


def _ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """part / whole, or `empty` if the whole is 0, as in a layer whose tokens all chose null experts."""
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)
