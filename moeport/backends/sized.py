"""Inputs of a model's sizes on which kernels are timed, by kernel of `Ops`. All frameworks share this.

A kernel without an entry is not timed: of its candidates, the first that passes is used. An entry says which of the
sizes of its arguments matter, makes inputs of such sizes, and knows how much there is to compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moeport.backends.examples import plan_of
from moeport.backends.timing import Sizes
from moeport.core.array import Array
from moeport.core.ops import CAUSAL, AttentionOptions, Ops

SKEWED = 2.0
"""A load is skewed if the busiest expert has this many times the mean."""
EXPONENTS = {"even": 0.0, "unknown": 0.5, "skewed": 1.0}
"""By load: expert e is chosen with a probability in proportion to (e + 1)^-exponent, so `skewed` is Zipf's law. A load
is unknown where reading it would make the host wait for a device.
"""
DOCUMENTS = 4
"""Documents per sequence where they are masked: how many a call has is not read, since a device would be waited for."""
WORTH_FLOPS = 2**28
"""Fewest floating-point operations of the forward pass for which it is worth while to time a kernel."""


@dataclass(frozen=True)
class Sized:
    """How a kernel is timed."""

    sizes_of: Callable[..., Sizes | None]
    """Takes the Ops and the arguments of the kernel. Returns the sizes that matter; None: these are not timed."""
    example: Callable[[Ops, str, Mapping[str, Any], int], tuple[list[Any], int]]
    """Takes the Ops, the compute type, sizes by name, and by which power of two the work should be smaller. Returns
    arguments, and how many of the arrays among them, from the first, are differentiated.
    """
    load: Callable[[Ops, Mapping[str, Any], int, int], dict[int, Any]]
    """Takes the Ops, sizes by name, the power of two, and a counter. Returns the arguments, by their places, that are
    new in each step of training, where experts get other numbers of rows every time. The example has those of 0.
    """
    flops: Callable[[Mapping[str, Any]], float]
    """Takes sizes by name. Returns the floating-point operations of the forward pass."""
    most_flops: Callable[..., float] | None = None
    """Takes the arguments of the kernel. Returns a bound of `flops` that is found without looking at data, so that the
    calls of generation, which are short, need not find out sizes; None: there is none.
    """


def power_of_two(count: int) -> int:
    """The nearest power of two, so that a trial serves all batches of about a size."""
    return 1 << round(math.log2(max(1, count)))


def load_of(ops: Ops, counts_E: Array) -> str:
    """A key of EXPONENTS."""
    counts = ops.on_host(counts_E)
    if counts is None:
        return "unknown"
    total = int(counts.sum())
    return "skewed" if int(counts.max(initial=0)) * len(counts) >= SKEWED * total > 0 and len(counts) > 1 else "even"


def _routed_sizes(
    ops: Ops, x_TD: Array, weight_N: Array, plan: Any, w_in: Array, w_out_EDF: Array, activation: str
) -> Sizes | None:
    if plan.choices_per_token is None:
        return None
    experts, width, hidden = w_out_EDF.shape
    return (
        ("T", power_of_two(x_TD.shape[0])),
        ("k", plan.choices_per_token),
        ("E", experts),
        ("D", width),
        ("F", hidden),
        ("activation", activation),
        ("weights", ops.dtype(w_in)),
        ("load", load_of(ops, plan.counts_E)),
    )


def _routed_example(ops: Ops, dtype: str, sizes: Mapping[str, Any], part: int) -> tuple[list[Any], int]:
    """Fewer experts, and as many fewer tokens, so that each has the rows that it would have; then fewer tokens only."""
    experts, tokens = max(sizes["E"] // part, sizes["k"]), max(sizes["T"] // part, 1)
    gates_N = np.random.default_rng(3).uniform(0.1, 1, tokens * sizes["k"]).astype(np.float32)
    x_TD, *weights = _arrays(ops, dtype, sizes, experts, tokens)
    gates = ops.cast(ops.from_numpy(gates_N), "float64" if dtype == "float64" else "float32")
    plan = _routed_load(ops, sizes, part, 0)[_PLAN]
    return [x_TD, gates, plan, *weights, sizes["activation"]], 4


_PLAN, _COUNTS = 2, 3
"""Places of the plan and of the rows per expert among the arguments."""


def _routed_load(ops: Ops, sizes: Mapping[str, Any], part: int, turn: int) -> dict[int, Any]:
    experts, choices = max(sizes["E"] // part, sizes["k"]), sizes["k"]
    expert_TK = _chosen(max(sizes["T"] // part, 1), experts, choices, EXPONENTS[sizes["load"]], turn)
    return {_PLAN: plan_of(ops, expert_TK.reshape(-1), choices, experts)}


def _grouped_sizes(
    ops: Ops, x_RD: Array, w_in: Array, w_out_EDF: Array, counts_E: Array, activation: str
) -> Sizes | None:
    experts, width, hidden = w_out_EDF.shape
    return (
        ("R", power_of_two(x_RD.shape[0])),
        ("E", experts),
        ("D", width),
        ("F", hidden),
        ("activation", activation),
        ("weights", ops.dtype(w_in)),
        ("load", load_of(ops, counts_E)),
    )


def _grouped_example(ops: Ops, dtype: str, sizes: Mapping[str, Any], part: int) -> tuple[list[Any], int]:
    experts, rows = max(sizes["E"] // part, 1), max(sizes["R"] // part, 1)
    counts = _grouped_load(ops, sizes, part, 0)[_COUNTS]
    return [*_arrays(ops, dtype, sizes, experts, rows), counts, sizes["activation"]], 3


def _grouped_load(ops: Ops, sizes: Mapping[str, Any], part: int, turn: int) -> dict[int, Any]:
    experts, rows = max(sizes["E"] // part, 1), max(sizes["R"] // part, 1)
    expert_R1 = _chosen(rows, experts, 1, EXPONENTS[sizes["load"]], turn)
    return {_COUNTS: ops.from_numpy(np.bincount(expert_R1.reshape(-1), minlength=experts))}


def _attention_sizes(
    ops: Ops,
    q_BSHA: Array,
    k_BSGA: Array,
    v_BSGW: Array,
    options: AttentionOptions = CAUSAL,
) -> Sizes | None:
    batch, sequence, heads, width = q_BSHA.shape
    documents = () if options.document_BS is None else (("documents", DOCUMENTS),)
    return (
        ("B", power_of_two(batch)),
        ("S", power_of_two(sequence)),
        ("H", heads),
        ("G", k_BSGA.shape[2]),
        ("A", width),
        ("W", v_BSGW.shape[3]),
        ("causal", options.causal),
        *documents,
    )


def _attention_example(ops: Ops, dtype: str, sizes: Mapping[str, Any], part: int) -> tuple[list[Any], int]:
    """Fewer sequences, then shorter ones."""
    batch = max(sizes["B"] // part, 1)
    sequence = max(sizes["S"] * sizes["B"] // (part * batch), 1)
    shapes = ((sizes["H"], sizes["A"]), (sizes["G"], sizes["A"]), (sizes["G"], sizes["W"]))
    document_BS = None
    if "documents" in sizes:
        length = -(-sequence // sizes["documents"])
        document_BS = ops.from_numpy(np.tile(np.arange(sequence) // length * length, (batch, 1)))
    options = AttentionOptions(sizes["causal"], document_BS=document_BS)
    return [*(_filled(ops, dtype, 1.0, batch, sequence, *shape) for shape in shapes), options], 3


def _same_load(*_: Any) -> dict[int, Any]:
    """For kernels that no load matters to."""
    return {}


def _attention_flops(sizes: Mapping[str, Any]) -> float:
    pairs = sizes["B"] * sizes["S"] ** 2 * (0.5 if sizes["causal"] else 1.0) / sizes.get("documents", 1)
    return 2.0 * pairs * sizes["H"] * (sizes["A"] + sizes["W"])


def _chosen(tokens: int, experts: int, choices: int, exponent: float, turn: int) -> np.ndarray:
    """Experts of each token, (tokens, choices): for a turn above 0, of as many tokens drawn from those of turn 0."""
    expert_TK = _drawn(tokens, experts, choices, exponent)
    return expert_TK[np.random.default_rng((turn, 0)).integers(tokens, size=tokens)] if turn else expert_TK


@lru_cache(maxsize=2)
def _drawn(tokens: int, experts: int, choices: int, exponent: float) -> np.ndarray:
    """Distinct experts of each token, drawn with unequal probabilities (Gumbel's trick)."""
    score_TE = np.random.default_rng(0).gumbel(size=(tokens, experts)) - exponent * np.log(np.arange(1, experts + 1))
    return np.argsort(-score_TE, axis=1, kind="stable")[:, :choices].copy()


def _arrays(ops: Ops, dtype: str, sizes: Mapping[str, Any], experts: int, rows: int) -> list[Array]:
    """Inputs and weights."""
    width, hidden = sizes["D"], sizes["F"]
    height = 2 * hidden if sizes["activation"] == "swiglu" else hidden
    x_RD = _filled(ops, dtype, 1.0, rows, width)
    w_in = _filled(ops, sizes["weights"], width**-0.5, experts, height, width)
    return [x_RD, w_in, _filled(ops, sizes["weights"], hidden**-0.5, experts, width, hidden)]


def _filled(ops: Ops, dtype: str, scale: float, *shape: int) -> Array:
    """An array whose rows repeat a few that are drawn: drawing billions of numbers on the host would take long."""
    rows, width = int(np.prod(shape[:-1])), shape[-1]
    drawn = np.random.default_rng(1).normal(0, scale, (min(rows, 251), width)).astype(np.float32)
    block = ops.cast(ops.from_numpy(drawn), dtype)
    return ops.reshape(ops.take_rows(block, ops.from_numpy(np.arange(rows) % len(drawn))), shape)


def _mlp_flops(rows: int, sizes: Mapping[str, Any]) -> float:
    return (6.0 if sizes["activation"] == "swiglu" else 4.0) * rows * sizes["D"] * sizes["F"]


def _most_routed_flops(
    x_TD: Array, weight_N: Array, plan: Any, w_in: Array, w_out_EDF: Array, activation: str
) -> float:
    rows = 2 * weight_N.shape[0]  # the number of tokens is rounded to a power of two
    return 2.0 * rows * (math.prod(w_in.shape[1:]) + math.prod(w_out_EDF.shape[1:]))


SIZED: Mapping[str, Sized] = {
    "attention": Sized(_attention_sizes, _attention_example, _same_load, _attention_flops),
    "grouped_mlp": Sized(_grouped_sizes, _grouped_example, _grouped_load, lambda sizes: _mlp_flops(sizes["R"], sizes)),
    "routed_mlp": Sized(
        _routed_sizes,
        _routed_example,
        _routed_load,
        lambda sizes: _mlp_flops(sizes["T"] * sizes["k"], sizes),
        _most_routed_flops,
    ),
}
"""By kernel."""
