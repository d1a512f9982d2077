"""What AdamW, and Muon's momentum, make of given gradients, to judge an optimiser apart from the gradients it receives.

Two sides whose routing or rounding differs have different gradients, and moments and updates differ with them. Whether
B's optimiser is A's does not depend on that: A's rule, applied to B's gradients, must give B's moments and updates.
Muon's updates take whole matrices, of which a recording may hold samples, so they are compared with A's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from moeport.parity.metrics import relative_rms, ulp
from moeport.parity.recording import Recording, Step, sample_indices
from moeport.parity.thresholds import RULE

JUDGED = ("moment", "update", "second step")
"""Kinds of tensors on which the rule says something."""
FIRST = {"g": "training gradient:{}", "p": "parameter:{}"}
"""What the rule needs of a parameter in the first step."""
SECOND = {
    "g": "step 2 gradient:{}",
    "p": "parameter:{}",
    "u": "update:{}",
    "m": "exp_avg:{}",
    "v": "exp_avg_sq:{}",
}
"""What it needs in the second."""
MOMENTUM = {"g": "step 2 gradient:{}", "m": "momentum_buffer:{}"}
"""What it needs of a matrix of Muon's in the second."""


@dataclass(frozen=True)
class Rule:
    """AdamW with decoupled weight decay, bias correction and clipping by the global norm (Loshchilov and Hutter 2019,
    Algorithm 2), and the momentum of Muon, in float64.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float | None
    momentum: float = 0.0
    """Of Muon."""
    share: float = 1.0
    """AdamW's learning rate over that of the step."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rule | None:
        """The rule of a config; None if the config has no such optimiser."""
        section = config.get("optimizer") or {}
        keys = ("beta1", "beta2", "eps", "weight_decay", "clip_norm")
        if section.get("name") not in ("adamw", "muon") or not {*keys} <= section.keys():
            return None
        rule = cls(**{key: section[key] for key in keys})
        if section["name"] == "adamw":
            return rule
        rate = section["learning_rate"]
        share = (section["muon"]["adamw_learning_rate"] or rate) / rate
        return replace(rule, momentum=section["muon"]["momentum"], share=share)

    def clipped(self, gradient: np.ndarray, norm: float) -> np.ndarray:
        """The gradient that moments take, given the norm of all gradients."""
        return gradient * (1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6)))

    def moments(
        self, gradient: np.ndarray, norm: float, mean: np.ndarray, square: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """New moments from the gradient, the norm of all gradients and the present moments."""
        clipped = self.clipped(gradient, norm)
        return (
            self.beta1 * mean + (1 - self.beta1) * clipped,
            self.beta2 * square + (1 - self.beta2) * clipped * clipped,
        )

    def update(self, step: int, rate: float, mean: np.ndarray, square: np.ndarray, decayed: np.ndarray) -> np.ndarray:
        """Change of a parameter in a step, counted from 1; `decayed` is the parameter, or 0 where it does not decay."""
        rate = rate * self.share
        root = np.sqrt(square / (1 - self.beta2**step)) + self.eps
        return -rate * (mean / (1 - self.beta1**step) / root + self.weight_decay * decayed)


@dataclass(frozen=True)
class Deviation:
    """How far a tensor is from what the rule makes of the gradients of its side."""

    error: float
    """Relative RMS error."""
    limit: float
    expected: np.ndarray
    found: np.ndarray


class OptimizerJudge:
    """Holds the moments and updates of B against A's rule.

    Args:
        a: the reference, whose config has the rule.
        b: the other, with its own routing.
    """

    def __init__(self, a: Recording, b: Recording):
        self.a, self.b = a, b
        self.rule = Rule.of(a.config)

    @cached_property
    def explained(self) -> Mapping[str, int]:
        """For A's moments and updates, which of the values that the rule allows is A's; empty if the rule does not
        explain all of them, and thus says nothing on B's.
        """
        own = {name: self._candidates(self.a, name) for name, t in self.a.tensors.items() if t.kind in JUDGED}
        best = {name: min(range(len(found)), key=lambda i: found[i].error) for name, found in own.items() if found}
        explained = all(own[name][i].error <= own[name][i].limit for name, i in best.items())
        return best if explained else {}

    def deviation(self, name: str) -> Deviation | None:
        """That of B; None if it is unknown, because A's optimiser follows another rule or too little was recorded."""
        if self.rule is None or name not in self.explained:
            return None
        found = self._candidates(self.b, name)
        return found[self.explained[name]] if found else None

    def _candidates(self, side: Recording, name: str) -> list[Deviation]:
        """Deviations of a moment from the rule, or of an update from the rule with and without decay."""
        label, _, owner = name.partition(":")
        number, what = (2, label.removeprefix("step 2 ")) if label.startswith("step 2 ") else (1, label)
        muons = f"momentum_buffer:{owner}" in side.tensors
        judged = ("momentum_buffer",) if muons else ("exp_avg", "exp_avg_sq", "update")
        if what not in judged or len(side.trajectory) < number:
            return []
        needed = FIRST if number == 1 else MOMENTUM if muons else SECOND
        x = _flat(side, {**needed, "found": f"{label}:{{}}"}, owner)
        if x is None:
            return []
        kind = "float64" if side.tensors[name].dtype == "float64" else "float32"
        limit = RULE[kind]
        expected = self._expected(number, what, x, side.trajectory[number - 1])
        if what == "update":
            norm = float(np.linalg.norm(expected[0]))
            limit = 10 * limit + (float(np.linalg.norm(ulp(x["p"], kind))) / norm if norm else 0.0)
        return [Deviation(relative_rms(y, x["found"]), limit, y, x["found"]) for y in expected]

    def _expected(self, number: int, what: str, x: Mapping[str, np.ndarray], step: Step) -> list[np.ndarray]:
        """Flat entries that the rule allows."""
        rule, zero = self.rule, np.zeros_like(x["g"])
        assert rule
        if what == "momentum_buffer":
            return [rule.momentum * x.get("m", zero) + (1 - rule.momentum) * rule.clipped(x["g"], step.grad_norm)]
        mean, square = rule.moments(x["g"], step.grad_norm, x.get("m", zero), x.get("v", zero))
        if what != "update":
            return [mean if what == "exp_avg" else square]
        parameter = x["p"] + x.get("u", zero)
        return [rule.update(number, step.lr, mean, square, decayed) for decayed in (parameter, zero)]


def _flat(side: Recording, names: Mapping[str, str], owner: str) -> dict[str, np.ndarray] | None:
    """Flat entries of several tensors of a parameter, at the same places, in float64; None if some were not kept."""
    records = {key: side.tensors.get(name.format(owner)) for key, name in names.items()}
    known = {key: record for key, record in records.items() if record and record.values is not None and record.size}
    if len(known) < len(names) or len({record.size for record in known.values()}) > 1:
        return None
    sampled = any(record.keep == "sample" for record in known.values())
    flat = {}
    for key, record in known.items():
        values = np.asarray(record.values, np.float64).reshape(-1)
        whole = record.keep == "full"
        flat[key] = values[sample_indices(values.size, side.sample_size)] if sampled and whole else values
    return flat
