"""Cases of every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from moeport.conformance import formulas
from moeport.conformance.case import Case, chosen_tokens_plan, dispatch_plan
from moeport.conformance.numbers import grid, rng
from moeport.core.array import Array
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import AttentionOptions, Ops

EXPERTS = 3


def _linear() -> Iterator[Case]:
    def call(ops: Ops, x: Array, w: Array) -> Array:
        return ops.linear(x, w)

    def formula(x: np.ndarray, w: np.ndarray) -> Any:
        return np.einsum("...i,oi->...o", x, w)

    def call_accurate(ops: Ops, x: Array, w: Array) -> Array:
        return ops.linear_accurate(x, w)

    for label, shape in {"matrix": (5, 4), "batched": (2, 3, 4), "no rows": (0, 4)}.items():
        inputs = grid(1, *shape), grid(2, 3, 4)
        yield Case("linear", label, call, formula, inputs, weights=(1,))
        yield Case("linear_accurate", label, call_accurate, formula, inputs, weights=(1,), accurate=True)


def _rms_norm() -> Iterator[Case]:
    def call(ops: Ops, x: Array, weight: Array) -> Array:
        return ops.rms_norm(x, weight, 1e-5)

    def formula(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return formulas.rms_norm(x, weight, 1e-5)

    yield Case("rms_norm", "matrix", call, formula, (grid(3, 3, 8), grid(4, 8)), weights=(1,))
    yield Case("rms_norm", "heads", call, formula, (grid(3, 2, 3, 2, 4), grid(4, 4)), weights=(1,))
    yield Case(
        "rms_norm",
        "large eps",
        lambda ops, x, weight: ops.rms_norm(x, weight, 0.5),
        lambda x, weight: formulas.rms_norm(x, weight, 0.5),
        (grid(3, 3, 8), grid(4, 8)),
        weights=(1,),
    )


def _rope() -> Iterator[Case]:
    angle_SP = np.array([[0.0, 0.0], [1.0, 0.25], [2.0, 0.5]])

    def call(ops: Ops, x: Array) -> Array:
        tables = [ops.from_numpy(np.tile(table, 2)) for table in (np.cos(angle_SP), np.sin(angle_SP))]
        dtype = "float64" if ops.dtype(x) == "float64" else "float32"
        return ops.rope(x, *(ops.cast(table, dtype) for table in tables))

    yield Case("rope", "pairs", call, lambda x: formulas.rope(x, angle_SP), (grid(5, 2, 3, 2, 4),))

    angle_BSP = np.stack([angle_SP, angle_SP[[0, 0, 1]]])

    def call_each(ops: Ops, x: Array) -> Array:
        tables = [ops.from_numpy(np.tile(table, 2)) for table in (np.cos(angle_BSP), np.sin(angle_BSP))]
        return ops.rope(
            x, *(ops.cast(table, "float64" if ops.dtype(x) == "float64" else "float32") for table in tables)
        )

    yield Case("rope", "angles by sequence", call_each, lambda x: formulas.rope(x, angle_BSP), (grid(5, 2, 3, 2, 4),))


def _attention() -> Iterator[Case]:
    for heads, groups in ((2, 2), (2, 1), (4, 2), (4, 1)):
        arrays = grid(6, 2, 4, heads, 2), grid(7, 2, 4, groups, 2), grid(8, 2, 4, groups, 2)
        yield Case(
            "attention",
            f"{heads} heads on {groups}",
            lambda ops, q, k, v: ops.attention(q, k, v),
            formulas.attention,
            arrays,
        )
        yield Case(
            "attention",
            f"{heads} heads on {groups}, not causal",
            lambda ops, q, k, v: ops.attention(q, k, v, AttentionOptions(causal=False)),
            lambda q, k, v: formulas.attention(q, k, v, causal=False),
            arrays,
        )
        yield Case(
            "attention",
            f"{heads} heads on {groups}, narrow values and another scale",
            lambda ops, q, k, v: ops.attention(q, k, v, AttentionOptions(scale=0.3)),
            lambda q, k, v: formulas.attention(q, k, v, scale=0.3),
            (grid(6, 2, 4, heads, 6), grid(7, 2, 4, groups, 6), grid(8, 2, 4, groups, 4)),
        )
    yield from _attention_within_documents()
    yield Case(
        "attention",
        "one token",
        lambda ops, q, k, v: ops.attention(q, k, v),
        lambda q, k, v: v,
        (grid(6, 2, 1, 2, 4), grid(7, 2, 1, 2, 4), grid(8, 2, 1, 2, 4)),
    )


def _attention_within_documents() -> Iterator[Case]:
    """Three documents of 1, 2 and 2 tokens, and a sequence that is one."""
    document = np.array([[0, 1, 1, 3, 3], [0, 0, 0, 0, 0]])
    for heads, groups, causal, scale, width in (
        (2, 2, True, None, 2),
        (4, 2, True, 0.3, 4),
        (4, 2, False, None, 2),
    ):
        yield Case(
            "attention",
            f"{heads} heads on {groups} within documents{'' if causal else ', not causal'}",
            lambda ops, q, k, v, d, c=causal, scale=scale: ops.attention(q, k, v, AttentionOptions(c, scale, d)),
            lambda q, k, v, d, c=causal, scale=scale: formulas.attention(q, k, v, c, scale, d),
            (grid(6, 2, 5, heads, width), grid(7, 2, 5, groups, width), grid(8, 2, 5, groups, 2), document),
        )


NEW_POSITIONS = {
    "one each": [[3], [0]],
    "two each": [[1, 2], [3, 4]],
    "in another order": [[4, 0, 2], [1, 3, 2]],
    "of an empty cache": [[0], [0]],
}
"""Positions in two texts; the caches have room for five."""


def _cached_attention() -> Iterator[Case]:
    for label, positions in NEW_POSITIONS.items():
        position_BQ = np.array(positions, np.int64)
        new = position_BQ.shape[1]
        kinds = [(4, 2, 2, None), (2, 2, 2, None), (4, 1, 2, None), (2, 2, 4, 0.25)]
        for heads, groups, wide, scale in kinds if label == "two each" else kinds[:1]:
            yield Case(
                "cached_attention",
                f"{label}, {heads} heads on {groups}, values of width {wide}",
                lambda ops, *arrays, s=scale: ops.cached_attention(*arrays, s),
                partial(formulas.cached_attention, scale=scale),
                (
                    grid(6, 2, new, heads, 2),
                    grid(7, 2, new, groups, 2),
                    grid(8, 2, new, groups, wide),
                    grid(9, 2, 5, groups, 2),
                    grid(10, 2, 5, groups, wide),
                    position_BQ,
                ),
                differentiable=False,
            )


def _activations() -> Iterator[Case]:
    yield Case("swiglu", "x", lambda ops, x: ops.swiglu(x), formulas.swiglu, (grid(9, 3, 8),))
    yield Case("gelu", "x", lambda ops, x: ops.gelu(x), formulas.gelu, (grid(10, 3, 4),))


def _mlps() -> Iterator[Case]:
    for activation, rows in (("swiglu", 6), ("gelu", 3)):
        yield Case(
            "mlp",
            activation,
            lambda ops, x, w_in, w_out, a=activation: ops.mlp(x, w_in, w_out, a),
            lambda x, w_in, w_out, a=activation: formulas.mlp(x, w_in, w_out, a),
            (grid(11, 2, 3, 4), grid(12, rows, 4), grid(13, 4, 3)),
            weights=(1, 2),
        )
        counts = {
            "every expert": [1, 3, 3],
            "an expert without rows": [3, 0, 4],
            "all rows to one expert": [0, 7, 0],
            "rows of nobody": [2, 0, 1],
            "only rows of nobody": [0, 0, 0],
        }
        for label, counts_E in counts.items():
            yield Case(
                "grouped_mlp",
                f"{activation} {label}",
                lambda ops, x, w_in, w_out, n, a=activation: ops.grouped_mlp(x, w_in, w_out, n, a),
                lambda x, w_in, w_out, n, a=activation: formulas.grouped_mlp(x, w_in, w_out, n, a),
                (grid(14, 7, 4), grid(15, EXPERTS, rows, 4), grid(16, EXPERTS, 4, 3), np.array(counts_E)),
                weights=(1, 2),
            )
        yield Case(
            "grouped_mlp",
            f"{activation} widths of 8",
            lambda ops, x, w_in, w_out, n, a=activation: ops.grouped_mlp(x, w_in, w_out, n, a),
            lambda x, w_in, w_out, n, a=activation: formulas.grouped_mlp(x, w_in, w_out, n, a),
            (
                grid(14, 6, 8),
                grid(15, 2, 16 if activation == "swiglu" else 8, 8) / 2,
                grid(16, 2, 8, 8),
                np.array([2, 3]),
            ),
            weights=(1, 2),
        )


ASSIGNMENTS = {
    "one choice": (1, [2, 0, 2, 1, 0]),
    "two choices": (2, [2, 0, 1, 2, 2, 0, 0, 1]),
    "all experts": (3, [2, 0, 1, 1, 0, 2]),
    "an expert without rows": (2, [2, 0, 0, 2, 2, 0]),
    "all to one expert": (1, [1, 1, 1, 1]),
    "some unrouted": (2, [2, 3, 3, 3, 0, 3, 1, 0]),
    "all unrouted": (2, [3, 3, 3, 3]),
    "one token": (2, [1, 0]),
}
"""Choices per token, and expert of each assignment; expert 3 means unrouted."""


GROUPS = {
    "some": (4, np.array([2, 0, 3, 3, 1, 0, 2, 2])),
    "an empty one": (4, np.array([3, 0, 0, 3, 2])),
    "one entry": (3, np.array([1])),
    "no entries": (3, np.array([], np.int64)),
    "the last of 256": (256, np.array([255, 3, 255, 0])),
    "the last of 257": (257, np.array([256, 3, 255, 0, 256])),
    "the last of 40,000": (40_000, np.array([39_999, 32_768, 3, 32_767, 39_999])),
}
"""Number of groups, and the group of each entry."""


def _sorting() -> Iterator[Case]:
    for label, (groups, group_N) in GROUPS.items():
        yield Case(
            "sort_by_group",
            label,
            lambda ops, g, n=groups: ops.sort_by_group(g, n),
            lambda g, n=groups: formulas.sort_by_group(g, n),
            (group_N,),
        )
    for label, order_N in {"five": np.array([2, 4, 0, 1, 3]), "one": np.array([0])}.items():
        yield Case(
            "inverse",
            label,
            lambda ops, order: ops.inverse(order),
            lambda order: np.array([list(order).index(n) for n in range(len(order))]),
            (order_N,),
        )


def _dispatch() -> Iterator[Case]:
    for label, (choices, experts) in ASSIGNMENTS.items():
        expert_N = np.array(experts)
        yield Case(
            "permute",
            label,
            lambda ops, x, e, k=choices: ops.permute(x, dispatch_plan(ops, e, k, EXPERTS)),
            lambda x, e, k=choices: formulas.permute(x, e, k),
            (grid(17, len(experts) // choices, 4), expert_N),
        )
        yield Case(
            "unpermute",
            label,
            lambda ops, y, w, e, k=choices: ops.unpermute(y, w, dispatch_plan(ops, e, k, EXPERTS)),
            lambda y, w, e, k=choices: formulas.unpermute(y, w, e, k),
            (grid(18, len(experts), 4), np.where(expert_N < EXPERTS, grid(19, len(experts)), 0.0), expert_N),
            weights=(1,),
        )


EXPERTS_CHOOSE = {
    "experts choose": (4, [0, 0, 1, 1, 2, 2], [3, 0, 1, 3, 3, 2]),
    "experts choose, a token of no expert": (4, [0, 0, 1, 1, 2, 2], [3, 0, 3, 0, 0, 1]),
    "experts choose, an expert without rows": (3, [0, 0, 2, 2], [2, 0, 2, 1]),
    "experts choose, some dropped": (3, [0, 3, 1, 3, 3, 2], [2, 0, 2, 1, 0, 0]),
}
"""Tokens, and expert and token of each assignment; expert 3 means unrouted."""


def _expert_rows(seed: int, activation: str) -> tuple[np.ndarray, np.ndarray]:
    rows = 6 if activation == "swiglu" else 3
    return grid(seed, EXPERTS, rows, 4), grid(seed + 1, EXPERTS, 4, 3)


def _routed(
    label: str,
    num_tokens: int,
    expert_N: np.ndarray,
    token_N: np.ndarray,
    plan: Callable[..., DispatchPlan],
    activation: str,
) -> Case:
    gates = np.where(expert_N < EXPERTS, grid(29, len(expert_N)), 0.0)
    return Case(
        "routed_mlp",
        f"{activation} {label}",
        lambda ops, x, w, w_in, w_out, e, t: ops.routed_mlp(x, w, plan(ops, e, t), w_in, w_out, activation),
        lambda x, w, w_in, w_out, e, t: formulas.routed_mlp(x, w, w_in, w_out, e, t, activation),
        (grid(28, num_tokens, 4), gates, *_expert_rows(30, activation), expert_N, token_N),
        weights=(1, 2, 3),
    )


def _routed_mlp() -> Iterator[Case]:
    for label, (choices, experts) in ASSIGNMENTS.items():
        expert_N, tokens = np.array(experts), len(experts) // choices
        for activation in ("swiglu", "gelu") if label in ("two choices", "some unrouted") else ("swiglu",):
            yield _routed(
                label,
                tokens,
                expert_N,
                np.arange(len(experts)) // choices,
                lambda ops, e, _, k=choices: dispatch_plan(ops, e, k, EXPERTS),
                activation,
            )
    for label, (tokens, experts, chosen) in EXPERTS_CHOOSE.items():
        yield _routed(
            label,
            tokens,
            np.array(experts),
            np.array(chosen),
            lambda ops, e, t, n=tokens: chosen_tokens_plan(ops, e, t, n, EXPERTS),
            "swiglu",
        )


def _cross_entropy() -> Iterator[Case]:
    def call(ops: Ops, logits: Array, targets: Array) -> tuple[Array, Array]:
        return ops.cross_entropy(logits, targets)

    several = rng(20).integers(0, 5, 6)
    yield Case("cross_entropy", "rows", call, formulas.cross_entropy, (grid(21, 6, 5), several), accurate=True)
    one = np.array([3])
    yield Case("cross_entropy", "one row", call, formulas.cross_entropy, (grid(21, 1, 5), one), accurate=True)


def _linear_cross_entropy() -> Iterator[Case]:
    inputs = (grid(24, 6, 4), grid(25, 5, 4), rng(26).integers(0, 5, 6))
    for name in ("linear_cross_entropy", "linear_cross_entropy_by_token"):
        formula = getattr(formulas, name)
        for z_weight in (0.0, 0.25):
            yield Case(
                name,
                f"all results, z weight {z_weight}",
                lambda ops, x, w, targets, name=name, z=z_weight: getattr(ops, name)(x, w, targets, z),
                lambda x, w, targets, formula=formula, z=z_weight: formula(x, w, targets, z),
                inputs,
                weights=(1,),
                differentiable=False,
                accurate=True,
            )
            yield Case(
                name,
                f"loss, z weight {z_weight}",
                lambda ops, x, w, targets, name=name, z=z_weight: getattr(ops, name)(x, w, targets, z)[0],
                lambda x, w, targets, formula=formula, z=z_weight: formula(x, w, targets, z)[0],
                inputs,
                weights=(1,),
                accurate=True,
            )


CASES = [
    *_linear(),
    *_rms_norm(),
    *_rope(),
    *_attention(),
    *_cached_attention(),
    *_activations(),
    *_mlps(),
    *_sorting(),
    *_dispatch(),
    *_routed_mlp(),
    *_cross_entropy(),
    *_linear_cross_entropy(),
]
