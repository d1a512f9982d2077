"""The training loop, the same for every backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from moeport.config.schema import Config
from moeport.errors import NonFiniteError
from moeport.model.batch import Batch
from moeport.model.loss_terms import SEQUENCE_NATS, LossTerms
from moeport.training.batches import Batches
from moeport.training.metrics_table import StepMetrics
from moeport.training.objective_losses import SequenceNats, losses_by_denoiser
from moeport.training.placed import PlacedModel
from moeport.training.reduction import whole_steps
from moeport.training.routing_counts import KeptChoices, RoutingCounts
from moeport.training.schedule import learning_rate
from moeport.training.step_metrics import Ran, Speed, step_metrics


class Trainer:
    """Optimiser steps on one model.

    A step depends only on the config, the parameters, the optimiser state and the step number: batches and noise are
    drawn by counter, so a run resumed at step n does exactly what an uninterrupted one would have done.

    The host need not wait for the results of a step before it begins the next: `advance` begins one, and `collect`
    looks at all that were begun.

    Args:
        config: the whole config.
        placed: the model, on the ranks that train it; all ranks pass the same values for the other arguments.
        batches: the batches it trains on.
        start_step: steps already done, including skipped ones.
        peak_flops: FLOP/s of one rank's device that the MFU refers to.
        counts: counts what the routers of this rank choose; None: nothing does.
    """

    def __init__(
        self,
        config: Config,
        placed: PlacedModel,
        batches: Batches,
        start_step: int = 0,
        peak_flops: float = 1.0,
        counts: RoutingCounts | None = None,
    ):
        self.config, self.batches, self.step_number, self.counts = config, batches, start_step, counts
        self.shapes, self.model = placed.shapes, placed.arrays
        self.world, self.exchanges = placed.mesh.world, placed.exchanges
        self.peak_flops = peak_flops * self.world.size
        self.router_state = self.shapes.router_state_names()
        self.tokens_per_step = batches.tokens_per_step
        self.flops_per_token = self.shapes.training_flops_per_token(batches.examples.sequence_length)
        self.draw: Callable[[int], Iterable[Batch]] = batches.of_step
        """Where the micro-batches of a step, counted from 0, come from."""
        self._pending: list[Ran] = []

    @property
    def waits(self) -> bool:
        """Whether the host looks at each step before the parameters change, so that `collect` should follow it.

        It must if the model cannot refuse an update by itself, or if the host computes the state of routers.
        """
        return not self.model.runs_ahead or bool(self.router_state)

    @property
    def updates(self) -> int:
        """Number of steps done that updated the parameters, which is all but the skipped ones."""
        return self.config.training.updates(self.step_number)

    def skip(self) -> None:
        """Pass over one step without training on its batch."""
        self.step_number += 1

    def step(self) -> StepMetrics:
        """Do one optimiser step and wait for it.

        Raises NonFiniteError, before any parameter changes, if the loss or the gradient is not finite.
        """
        self.advance(waits=True)
        return list(self.collect())[-1]

    def advance(self, waits: bool = False) -> None:
        """Begin one optimiser step.

        Args:
            waits: look at its results before the parameters change; always done if `self.waits`.

        Raises NonFiniteError as `step` does, if it looks.
        """
        started, step, training = time.perf_counter(), self.step_number, self.config.training
        for exchange in self.exchanges.values():
            exchange.forget()
        parts, kept, nats = self._accumulate(step)
        norm = self.model.gradient_norm()
        lr = learning_rate(self.config.optimizer, step, training.steps)
        ran = Ran(step, lr, started, parts, norm, self._sent(), kept, nats)
        self._pending.append(ran)
        if waits or self.waits:
            self._look()
            self._check(ran)
        self.model.step(lr, norm)
        if self.router_state:
            state = self.model.parameters(self.router_state)
            self.model.load_parameters(self.shapes.updated_state(state, ran.terms.chosen_LE, ran.terms.affinity_L4E))
        self.step_number += 1

    def _accumulate(self, step: int) -> tuple[list[LossTerms], list[KeptChoices], list[SequenceNats]]:
        """Forward and backward of a step: the terms of its micro-batches, the choices that are to be counted, and the
        losses of its sequences if they have denoisers.
        """
        parts, kept, nats = [], list[KeptChoices](), list[SequenceNats]()
        counts, number_B = self.counts is not None and self.counts.samples(step), self.batches.objectives(step)
        for number, batch in enumerate(self.draw(step), start=1):
            terms = self.model.accumulate(batch, self._share, number == self.config.training.gradient_accumulation)
            terms, arrays = terms.without_kept()
            parts.append(terms)
            own = arrays.pop(SEQUENCE_NATS, None)
            if own is not None and batch.weight_BS is not None and number_B is not None:
                own_B, number_B = np.split(number_B, [len(batch.token_BS)])
                nats.append(SequenceNats(own, batch.weight_BS.sum(1, dtype=np.float64), own_B))
            if counts and arrays:
                kept.append(KeptChoices(batch.token_BS, arrays))
        return parts, kept, nats

    def _count(self, kept: Sequence[KeptChoices]) -> None:
        """Count the choices of a step."""
        assert self.counts is not None
        host = iter(self.world.ops.fetch([x for part in kept for x in part.arrays.values()]))
        self.counts.add([(part.token_BS, {name: next(host) for name in part.arrays}) for part in kept])

    def collect(self) -> Iterator[StepMetrics]:
        """Wait for the steps begun since the last call, and yield their metrics in order; every rank calls it.

        Each is given the mean duration of these steps.

        Raises NonFiniteError at the first step whose loss or gradient is not finite; no parameter has changed since.
        """
        self._look()
        pending, self._pending = self._pending, []
        seconds = (time.perf_counter() - pending[0].started) / len(pending) if pending else 0.0
        speed = Speed(seconds, self.tokens_per_step, self.flops_per_token, self.peak_flops)
        capacity = self.config.model.moe.capacity
        for ran in pending:
            self._check(ran, is_updated=True)
            if ran.kept:
                self._count(ran.kept)
            tokens = self.config.training.updates(ran.step + 1) * self.tokens_per_step
            yield step_metrics(ran, speed, tokens, capacity.is_estimated, self.world.size)

    @property
    def _share(self) -> float:
        """The part of a step that one micro-batch is."""
        return 1.0 / self.batches.num_parts

    def _look(self) -> None:
        """Fetch the results of all steps that are not known yet, over all ranks."""
        unknown = [ran for ran in self._pending if not ran.is_known]
        if not unknown:
            return
        terms, norms = whole_steps(self.world, [ran.parts for ran in unknown], [ran.norm for ran in unknown])
        sent = np.stack([ran.sent_L5 for ran in unknown])
        for ran, own, norm, sent_L5 in zip(
            unknown, terms, norms, self.world.sum_of_numbers(sent) if self.exchanges else sent, strict=True
        ):
            ran.terms, ran.grad_norm, ran.sent_L5 = own, norm, sent_L5
        if self.batches.denoising:
            names = self.batches.denoising.names
            found = losses_by_denoiser(self.world, names, [ran.nats for ran in unknown])
            for ran, by_denoiser in zip(unknown, found, strict=True):
                ran.by_denoiser = by_denoiser

    def _sent(self) -> np.ndarray:
        """What this rank sent in the exchanges of each MoE layer, as in `Ran`."""
        return np.array(
            [
                [v.intra_node_rows, v.inter_node_rows, v.intra_node_bytes, v.inter_node_bytes, v.seconds]
                for v in (exchange.sent() for exchange in self.exchanges.values())
            ],
            np.float64,
        ).reshape(-1, 5)

    def _check(self, ran: Ran, is_updated: bool = False) -> None:
        """Raise NonFiniteError if a step, after which gradients may have been cleared, is not finite."""
        if ran.is_finite:
            return
        self._pending, self.step_number = [], ran.step
        named = "loss or gradient norm"
        if self.world.size == 1:  # the search runs the model, which several ranks could only do together
            batches = list(self.batches.of_step(ran.step))
            for number, batch in enumerate(batches if is_updated else (), start=1):
                self.model.accumulate(batch, self._share, number == len(batches))
            named = next(filter(None, map(self.model.first_non_finite, batches)), "gradient norm")
        raise NonFiniteError(
            f"step {ran.step + 1}: {named} is not finite (loss {float(ran.terms.loss)}, gradient norm "
            f"{ran.grad_norm}); the parameters were not updated",
            step=ran.step + 1,
        )
