"""Small inputs on which fused operators are tried, by kernel of `Ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moeport.core.array import Array
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import AttentionOptions, Ops
from moeport.core.parameters import parameter_dtype

Example = Callable[[Ops, str], tuple[list[Any], int]]
"""Takes operations and a compute type. Returns the arguments of a kernel, and how many of the arrays among them, from
the first, a model differentiates. As in a model, parameters have the type of parameters, and gates are in float32.
"""


def differentiated_among(arguments: Sequence[Any], count: int) -> tuple[int, ...]:
    """Where the first arrays are among the arguments of a kernel, of which some has a plan between them."""
    return tuple(index for index, x in enumerate(arguments) if not isinstance(x, DispatchPlan))[:count]


BATCH, SEQUENCE, HEADS, GROUPS, WIDTH, HIDDEN = 2, 16, 4, 2, 64, 32


def _draw(ops: Ops, dtype: str, seed: int, *shape: int) -> Array:
    return ops.cast(ops.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)), dtype)


def _held(dtype: str) -> str:
    """The type of parameters and gates."""
    return "float32" if dtype == "float16" else parameter_dtype(dtype)


def _rms_norm(ops: Ops, dtype: str) -> tuple[list[Any], int]:
    return [_draw(ops, dtype, 0, 8, WIDTH), _draw(ops, _held(dtype), 1, WIDTH), 1e-5], 2


def _rope(ops: Ops, dtype: str) -> tuple[list[Any], int]:
    angle_SP = np.random.default_rng(1).standard_normal((SEQUENCE, WIDTH // 2)).astype(np.float32)
    tables = [ops.from_numpy(np.tile(table(angle_SP), 2)) for table in (np.cos, np.sin)]
    return [_draw(ops, dtype, 0, BATCH, SEQUENCE, HEADS, WIDTH), *(ops.cast(x, _held(dtype)) for x in tables)], 1


def _attention(causal: bool, scale: float | None = None, starts: Sequence[Sequence[int]] = ()) -> Example:
    """`starts` are the first positions of each sequence's documents, if there are any."""

    def example(ops: Ops, dtype: str) -> tuple[list[Any], int]:
        heads = (HEADS, GROUPS, GROUPS)
        document_BS = None
        if starts:
            document_BS = ops.from_numpy(np.stack([np.repeat(each, np.diff([*each, SEQUENCE])) for each in starts]))
        arrays = (_draw(ops, dtype, i, BATCH, SEQUENCE, n, WIDTH) for i, n in enumerate(heads))
        return [*arrays, AttentionOptions(causal, scale, document_BS)], 3

    return example


def _swiglu(ops: Ops, dtype: str) -> tuple[list[Any], int]:
    return [_draw(ops, dtype, 0, 8, 2 * WIDTH)], 1


def _grouped_mlp(counts: list[int], activation: str) -> Example:
    """Ten rows; those that the counts leave over belong to no expert."""

    def example(ops: Ops, dtype: str) -> tuple[list[Any], int]:
        experts, rows, scale = len(counts), 2 * HIDDEN if activation == "swiglu" else HIDDEN, WIDTH**-0.5
        w_in, w_out = (
            ops.cast(ops.from_numpy(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)), kind)
            for seed, shape, kind in (
                (1, (experts, rows, WIDTH), _held(dtype)),
                (2, (experts, WIDTH, HIDDEN), _held(dtype)),
            )
        )
        return [_draw(ops, dtype, 0, 10, WIDTH), w_in, w_out, ops.from_numpy(np.array(counts)), activation], 3

    return example


def plan_of(ops: Ops, expert_N: np.ndarray, choices: int, experts: int) -> DispatchPlan:
    """The plan for experts by assignment; expert E means unrouted."""
    order_R = np.argsort(expert_N, kind="stable")
    arrays = (order_R, np.argsort(order_R), order_R // choices, np.bincount(expert_N, minlength=experts + 1)[:experts])
    order, position, token, counts = (ops.from_numpy(x) for x in arrays)
    served = bool((expert_N < experts).all())
    return DispatchPlan(order, position, token, counts, len(expert_N) // choices, choices, served)


_EXPERT_N = np.array([2, 0, 3, 2, 0, 3, 2, 0, 3, 3, 0, 2])
"""Of six tokens with two choices each among three experts: one expert without rows, and some assignments unrouted."""


def _permute(ops: Ops, dtype: str) -> tuple[list[Any], int]:
    return [_draw(ops, dtype, 0, 6, WIDTH), plan_of(ops, _EXPERT_N, 2, 3)], 1


def _unpermute(ops: Ops, dtype: str) -> tuple[list[Any], int]:
    gates_N = np.where(_EXPERT_N < 3, np.random.default_rng(1).uniform(0.1, 1, 12), 0).astype(np.float32)
    weight_N = ops.cast(ops.from_numpy(gates_N), _held(dtype))
    return [_draw(ops, dtype, 0, 12, WIDTH), weight_N, plan_of(ops, _EXPERT_N, 2, 3)], 2


def _routed_mlp(expert_N: list[int], experts: int, activation: str) -> Example:
    """Six tokens with two choices each; the last expert's number means unrouted."""

    def example(ops: Ops, dtype: str) -> tuple[list[Any], int]:
        (_, w_in, w_out, *_), _ = _grouped_mlp([0] * experts, activation)(ops, dtype)
        chosen_N = np.array(expert_N)
        gates_N = np.where(chosen_N < experts, np.random.default_rng(3).uniform(0.1, 1, 12), 0).astype(np.float32)
        x_TD, weight_N = _draw(ops, dtype, 0, 6, WIDTH), ops.cast(ops.from_numpy(gates_N), _held(dtype))
        return [x_TD, weight_N, plan_of(ops, chosen_N, 2, experts), w_in, w_out, activation], 4

    return example


EXAMPLES: Mapping[str, tuple[Example, ...]] = {
    "rms_norm": (_rms_norm,),
    "rope": (_rope,),
    "attention": (
        _attention(True),
        _attention(False),
        _attention(True, 0.2),
        _attention(True, 0.2, starts=((0, 5, 6), (0,))),
    ),
    "swiglu": (_swiglu,),
    "grouped_mlp": (
        _grouped_mlp([3, 0, 5], "swiglu"),
        _grouped_mlp([4, 6, 0], "gelu"),
        _grouped_mlp([8], "swiglu"),
    ),
    "permute": (_permute,),
    "unpermute": (_unpermute,),
    "routed_mlp": (
        _routed_mlp([2, 0, 3, 2, 0, 3, 2, 0, 3, 3, 0, 2], 4, "swiglu"),
        _routed_mlp([2, 0, 3, 2, 0, 3, 2, 0, 3, 3, 0, 2], 3, "swiglu"),
        _routed_mlp([2, 0, 3, 2, 0, 3, 2, 0, 3, 3, 0, 2], 4, "gelu"),
    ),
}
