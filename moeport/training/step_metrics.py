"""Turns what a step left behind into its line of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.core.array import Array
from moeport.model.capacity import estimate_from
from moeport.model.loss_terms import LossTerms
from moeport.model.moe_metrics import FILL_RATE
from moeport.training.metrics_table import StepMetrics
from moeport.training.objective_losses import SequenceNats
from moeport.training.reduction import measured
from moeport.training.routing_counts import KeptChoices


@dataclass(frozen=True)
class Speed:
    """How fast a step was, and what that is compared with."""

    seconds: float
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float
    """FLOP/s of all ranks' devices that the MFU refers to."""

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_step / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation."""
        return self.tokens_per_second * self.flops_per_token / self.peak_flops


@dataclass
class Ran:
    """A step that was given to the device, of which the host may know no result yet."""

    step: int
    """Its number, counted from 0."""
    lr: float
    started: float
    """When it began, on this rank's clock."""
    parts: list[LossTerms]
    """The terms of this rank's micro-batches, on the device."""
    norm: Array
    """Gradient norm, on the device."""
    sent_L5: np.ndarray
    """What this rank sent in the exchanges of each MoE layer: rows inside and between nodes, bytes inside and between
    nodes, seconds; (0, 5) without exchanges.
    """
    kept: Sequence[KeptChoices] = ()
    """What the routers chose, if that is to be counted."""
    nats: Sequence[SequenceNats] = ()
    """The losses of this rank's sequences, where they have denoisers."""
    by_denoiser: dict[str, float] | None = None
    """Mean loss of each denoiser over all ranks; None: not looked at yet, or no mixture."""
    terms: Any = None
    """Those of the whole step as numpy arrays; None: not looked at yet."""
    grad_norm: float = math.nan

    @property
    def is_known(self) -> bool:
        """Whether the host has looked at it."""
        return self.terms is not None

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm of a step that is known are finite."""
        return math.isfinite(float(self.terms.loss)) and math.isfinite(self.grad_norm)


def step_metrics(ran: Ran, speed: Speed, tokens: int, is_estimated: bool, ranks: int) -> StepMetrics:
    """The metrics of a step that is known.

    Args:
        ran: the step; `sent_L5` is the sum over the ranks.
        speed: its duration.
        tokens: trained on since the first step.
        is_estimated: whether capacities are estimated.
        ranks: their number.
    """
    terms, sent_L5 = ran.terms, ran.sent_L5
    chosen_LE, served_LE = terms.chosen_LE, terms.served_LE
    chosen_L, loss = chosen_LE.sum(1), float(terms.cross_entropy)
    estimates = [estimate_from(affinity_4E) for affinity_4E in terms.affinity_L4E] if is_estimated else []
    chosen_P, dropped_P = terms.positions_L2P.sum(0)
    of_layers = measured(terms)
    filled = round(of_layers.get(FILL_RATE, 0.0) * float(chosen_L.sum()))
    imbalance_L = _ratio(chosen_LE.max(1) * chosen_LE.shape[1], chosen_L, 1.0)
    dead_L, entropy_L = (chosen_LE == 0).sum(1), _entropy(chosen_LE)
    return StepMetrics(
        step=ran.step + 1,
        loss=loss,
        total_loss=float(terms.loss),
        lr=ran.lr,
        grad_norm=ran.grad_norm,
        tokens_per_second=speed.tokens_per_second,
        step_time=speed.seconds,
        tokens=tokens,
        mfu=speed.mfu,
        load_balance=float(terms.load_balance),
        router_z=float(terms.router_z),
        output_z=float(terms.output_z),
        imbalance=float(imbalance_L.mean()),
        drop_rate=float(_ratio(chosen_LE.sum() - served_LE.sum(), chosen_LE.sum())),
        dead_experts=int(dead_L.sum()),
        load_entropy=round(float(entropy_L.mean()), 6),
        expert_load=[[round(float(x), 6) for x in row] for row in _ratio(chosen_LE, chosen_L[:, None])],
        drop_rate_per_layer=[round(float(x), 6) for x in _ratio(chosen_L - served_LE.sum(1), chosen_L)],
        imbalance_per_layer=[round(float(x), 3) for x in imbalance_L],
        dead_experts_per_layer=[int(x) for x in dead_L],
        load_entropy_per_layer=[round(float(x), 4) for x in entropy_L],
        assignments_per_layer=[int(x) for x in chosen_L],
        capacity_per_layer=[int(x) for x in terms.capacity_L] if terms.capacity_L.any() else [],
        delta_per_layer=[math.nan if e is None else round(e.delta, 6) for e in estimates],
        kept_per_layer=[math.nan if e is None else round(e.kept, 3) for e in estimates],
        competitors_per_layer=[math.nan if e is None else round(e.rivals, 3) for e in estimates],
        drop_rate_by_position=[round(float(x), 6) for x in _ratio(dropped_P, chosen_P)] if chosen_P.any() else [],
        exchange_time=float(sent_L5[:, 4].sum()) / ranks,
        exchanged_rows_per_layer=[[int(x) for x in row] for row in sent_L5[:, :2]],
        exchanged_bytes_per_layer=[[int(x) for x in row] for row in sent_L5[:, 2:4]],
        rows_computed=int(served_LE.sum()) + filled,
        loss_by_objective=ran.by_denoiser,
        **of_layers,
    )


def _ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """part / whole, or `empty` if the whole is 0, as in a layer whose tokens all chose null experts."""
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)


def _entropy(chosen_LE: np.ndarray) -> np.ndarray:
    """Entropy of the loads of each layer as a share of log E (L,); 1 for a layer that nothing chose."""
    share_LE = _ratio(chosen_LE, chosen_LE.sum(1, keepdims=True), 1 / chosen_LE.shape[1])
    nats_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1.0))).sum(1)
    return nats_L / np.log(max(2, chosen_LE.shape[1]))
