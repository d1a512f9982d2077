"""How alike the experts of one layer are: their weights, and what they give for the same tokens.

After "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv 2406.18219).
Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import erf, expit
from scipy.stats import kendalltau

from moeport.studies.inspect.components import BLOCK, Components, components
from moeport.studies.inspect.walk import Layer

ACTIVE = 0.001
"""A neuron whose activation is further than this from 0 is active, as in the paper."""
PAIRS = 6
"""Pairs of experts whose neurons are matched."""
NEURONS = 1024
"""Most neurons that are matched: the time grows with their third power."""
TOKENS_AT_ONCE = 16


@dataclass(frozen=True)
class Matched:
    """The neurons of two experts, each matched with one of the other's so that their cosines have the largest sum."""

    experts: tuple[int, int]
    matrix: str
    before: float
    """Mean cosine of neurons of the same number."""
    after: float
    """Mean cosine of matched neurons."""
    tau: float
    """Kendall's tau of the two orders: 1 if the neurons stay where they are, about 0 for a random order."""


@dataclass(frozen=True)
class Likeness:
    """How alike the experts of one layer are."""

    matrices: Mapping[str, np.ndarray]
    """Cosines (E, E) of the flattened weights, by matrix: gate, up and down of swiglu, in and out of gelu."""
    neurons: Mapping[str, np.ndarray]
    """Cosines (E, E) of the mean neurons."""
    components: Mapping[str, Components]
    """Principal components of the flattened weights, by matrix; empty if there are fewer than 3 experts, which lie on a
    line."""
    matched: Sequence[Matched]
    """Empty if there are more than NEURONS neurons."""
    gate_fit: Mapping[str, float]
    """R squared of the cosines of gate rows against those of mean neurons, over all pairs, by matrix; empty without
    gate rows. NaN where there is one pair only."""
    outputs: np.ndarray
    """Angular similarity 1 - arccos(cos) / pi of the experts' outputs (E, E), mean over tokens."""
    rank_EE: np.ndarray
    """How many tokens had the expert with the n-th largest output at the s-th place by score: row n, column s."""
    active_E: np.ndarray
    """Share of the active neurons of each expert, mean over tokens."""
    tokens: int
    """Tokens that all experts were given."""


def likeness(layer: Layer, tokens: int) -> Likeness:
    """Compare the experts of one layer.

    Args:
        layer: its weights, and the tokens that it read.
        tokens: how many of them every expert is given, evenly spread.
    """
    weights = matrices_of(layer)
    neurons = {name: cosines(_mean_neurons(name, w)) for name, w in weights.items()}
    outputs_EE, rank_EE, active_E, count = _on_tokens(layer, tokens)
    return Likeness(
        {name: _flat_cosines(w) for name, w in weights.items()},
        neurons,
        {name: components(w) for name, w in weights.items()} if layer.num_experts > 2 else {},
        _matched(weights, layer.num_experts),
        _gate_fit(layer, neurons),
        outputs_EE,
        rank_EE,
        active_E,
        count,
    )


def matrices_of(layer: Layer) -> dict[str, np.ndarray]:
    """The matrices of the experts by name: (E, F, D), but (E, D, F) of `down` and `out`."""
    w_in, w_out = layer.params["experts.w_in"], layer.params["experts.w_out"]
    if layer.moe.config.activation == "swiglu":
        width = w_in.shape[1] // 2
        return {"gate": w_in[:, :width], "up": w_in[:, width:], "down": w_out}
    return {"in": w_in, "out": w_out}


def cosines(x_RD: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of rows (R, R); of a row of zeros with anything, 0."""
    length_R1 = np.linalg.norm(x_RD, axis=1, keepdims=True)
    unit_RD = x_RD / np.where(length_R1 > 0, length_R1, 1.0)
    found: np.ndarray = unit_RD @ unit_RD.T
    return found


def off_diagonal(x_EE: np.ndarray) -> float:
    """The mean over all pairs of two experts; NaN if there is one expert."""
    experts = len(x_EE)
    return float((x_EE.sum() - np.trace(x_EE)) / (experts * (experts - 1))) if experts > 1 else float("nan")


def match(first_FD: np.ndarray, second_FD: np.ndarray) -> tuple[float, float, float]:
    """Match the neurons of two experts by linear assignment.

    Args:
        first_FD: the neurons of one, a row each.
        second_FD: of the other.

    Returns: mean cosine before and after, and Kendall's tau.
    """
    width = len(first_FD)
    cosine_FF = cosines(np.concatenate([first_FD, second_FD]).astype(np.float64))[:width, width:]
    rows, columns = linear_sum_assignment(cosine_FF, maximize=True)
    tau = kendalltau(rows, columns).statistic if width > 1 else float("nan")
    return float(np.diag(cosine_FF).mean()), float(cosine_FF[rows, columns].mean()), float(tau)


def _mean_neurons(name: str, w: np.ndarray) -> np.ndarray:
    """The mean of each expert's neurons, (E, D) in float64."""
    return w.mean(axis=2 if name in ("down", "out") else 1, dtype=np.float64)


def _neurons(name: str, w: np.ndarray, expert: int) -> np.ndarray:
    """The neurons of one expert, a row each."""
    return w[expert].T if name in ("down", "out") else w[expert]


def _flat_cosines(w: np.ndarray) -> np.ndarray:
    """Cosines (E, E) of flattened matrices, added up in blocks of rows."""
    experts, rows, columns = w.shape
    gram_EE, step = np.zeros((experts, experts)), max(1, BLOCK // (experts * columns))
    for first in range(0, rows, step):
        flat = w[:, first : first + step].reshape(experts, -1).astype(np.float64)
        gram_EE += flat @ flat.T
    length_E = np.sqrt(np.diag(gram_EE))
    length_E = np.where(length_E > 0, length_E, 1.0)
    return gram_EE / length_E / length_E[:, None]


def _matched(weights: Mapping[str, np.ndarray], experts: int) -> list[Matched]:
    """Some pairs of experts, evenly chosen from all."""
    if next(iter(weights.values())).shape[1] > NEURONS:
        return []
    pairs = list(combinations(range(experts), 2))
    count = min(PAIRS, len(pairs))
    chosen = [pairs[i * len(pairs) // count] for i in range(count)]
    return [
        Matched(pair, name, *match(*(_neurons(name, w, expert) for expert in pair)))
        for name, w in weights.items()
        for pair in chosen
    ]


def _gate_fit(layer: Layer, neurons: Mapping[str, np.ndarray]) -> dict[str, float]:
    if not layer.moe.config.router.has_gate_rows or "router.weight" not in layer.params:
        return {}
    rows = layer.params["router.weight"]
    upper = np.triu_indices(layer.num_experts, 1)
    x = cosines(rows[: layer.num_experts].astype(np.float64))[upper]
    found = {}
    for name, y_EE in neurons.items():
        y = y_EE[upper]
        varies = len(x) > 1 and x.std() > 0 and y.std() > 0
        found[name] = float(np.corrcoef(x, y)[0, 1] ** 2) if varies else float("nan")
    return found


def _on_tokens(layer: Layer, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """What all experts give for the same tokens."""
    experts = layer.num_experts
    x_TD, score_TE = (np.concatenate([getattr(each, name) for each in layer.routed]) for name in ("x_TD", "probs_TE"))
    chosen = np.unique(np.linspace(0, len(x_TD) - 1, min(tokens, len(x_TD))).astype(np.int64))
    similar_EE, rank_EE, active_E = (
        np.zeros((experts, experts)),
        np.zeros((experts, experts), np.int64),
        np.zeros(experts),
    )
    for first in range(0, len(chosen), TOKENS_AT_ONCE):
        rows = chosen[first : first + TOKENS_AT_ONCE]
        y_ETD, active_ET = _outputs(layer, x_TD[rows])
        active_E += active_ET.sum(1)
        for y_ED, score_E in zip(y_ETD.transpose(1, 0, 2), score_TE[rows], strict=True):
            similar_EE += 1 - np.arccos(np.clip(cosines(y_ED), -1, 1)) / np.pi
            by_norm, by_score = (np.argsort(-key, kind="stable") for key in (np.linalg.norm(y_ED, axis=1), score_E))
            rank_EE[np.arange(experts), np.argsort(by_score)[by_norm]] += 1
    return similar_EE / len(chosen), rank_EE, active_E / len(chosen), len(chosen)


def _outputs(layer: Layer, x_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (E, T, D) of all experts in float64, and their shares of active neurons (E, T)."""
    weights, outputs, active = matrices_of(layer), [], []
    x_TD = x_TD.astype(np.float64)
    for expert in range(layer.num_experts):
        if "gate" in weights:
            gate_TF = x_TD @ weights["gate"][expert].T
            activation_TF = gate_TF * expit(gate_TF)
            hidden_TF = activation_TF * (x_TD @ weights["up"][expert].T)
            outputs.append(hidden_TF @ weights["down"][expert].T)
        else:
            inner_TF = x_TD @ weights["in"][expert].T
            activation_TF = inner_TF * 0.5 * (1 + erf(inner_TF * 2**-0.5))
            outputs.append(activation_TF @ weights["out"][expert].T)
        active.append((np.abs(activation_TF) > ACTIVE).mean(1))
    return np.stack(outputs), np.stack(active)
