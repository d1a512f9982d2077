"""A routing choice that rounding decides: the sides choose differently although neither is wrong."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np

from moeport.parity.record import record
from moeport.parity.subject import Subject

ROUTER = "layers.0.moe.router.weight"
NORM = "layers.0/mlp_norm:rms_norm"
CHOICE = "layers.0/moe.router:topk_ids"
NUDGES = (1e-8, 3e-8, 1e-7, 2e-7)
"""Relative sizes of what turns a tie: at most one rounding."""


@dataclass(frozen=True)
class Flip:
    """Router weights under which a token's second and third choice tie, and the same with the tie decided otherwise."""

    tied: np.ndarray
    turned: np.ndarray

    def prepare(self, subject: Subject) -> Subject:
        """A subject in which the token has the tie."""
        return replace(subject, params={**subject.params, ROUTER: self.tied})

    def turn(self, subject: Subject) -> Subject:
        """The same subject after one rounding of its weights more, which turns the tie."""
        moved = subject.params[ROUTER] + (self.turned - self.tied)
        return replace(subject, params={**subject.params, ROUTER: moved.astype(np.float32)})


def make_flip(subject: Subject, token: int = 5) -> Flip:
    """Find such weights for a token of the first block."""
    a = record(subject, steps=0)
    h = a.tensors[NORM].values.reshape(-1, 32)[token].astype(np.float64)
    weight_ED = subject.params[ROUTER].astype(np.float64)
    logits = weight_ED @ h
    _, second, third, *_ = np.argsort(-logits)
    weight_ED[third] += h * (logits[second] - logits[third]) / (h @ h)
    tied = weight_ED.astype(np.float32)
    size = np.linalg.norm(weight_ED[third]) / np.linalg.norm(h)
    for nudge in (sign * scale for scale in NUDGES for sign in (1, -1)):
        turned = weight_ED.copy()
        turned[third] += h * nudge * size
        flip = Flip(tied, turned.astype(np.float32))
        taken = flip.prepare(subject)
        first, other = (record(side, steps=0).tensors[CHOICE].values for side in (taken, flip.turn(taken)))
        if 0 < (first != other).sum() <= 2:
            return flip
    raise AssertionError("no tie that rounding decides")


def with_other_kernels(subject: Subject) -> Subject:
    """A subject whose backend says that it has other kernels, so that rounding may differ."""
    backend = copy.copy(subject.backend)
    backend.kernel_choices = lambda: {"linear": "another"}
    return replace(subject, backend=backend)
