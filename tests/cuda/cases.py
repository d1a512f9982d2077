"""Loads of experts, and the block of them that `moeport.backends.torch.cuda` computes, on the CPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moeport.backends.examples import plan_of
from moeport.backends.torch.cuda import stages
from moeport.backends.torch.cuda.block import expert_block
from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import Ops

CPU: Any = TorchOps(torch.device("cpu"))
NAN = float("nan")


@dataclass(frozen=True)
class Load:
    """Which experts T tokens choose; expert E means unrouted."""

    tokens: int
    choices: int
    experts: int
    width: int
    hidden: int
    of: str = "uniform"

    def experts_N(self):
        rng, number = np.random.default_rng(7), self.tokens * self.choices
        if self.of == "one":
            return np.full(number, self.experts // 2)
        if self.of == "dropped":
            return np.where(rng.random(number) < 0.4, self.experts, rng.integers(0, self.experts, number))
        if self.of == "all dropped":
            return np.full(number, self.experts)
        if self.of == "last two empty":
            return rng.integers(0, self.experts - 2, number)
        return rng.integers(0, self.experts, number)

    @property
    def whole(self):
        return "dropped" not in self.of


LOADS = [
    Load(12, 2, 5, 24, 40),
    Load(12, 2, 5, 24, 40, "dropped"),
    Load(9, 3, 6, 8, 8, "last two empty"),
    Load(20, 2, 3, 16, 24, "one"),
    Load(1, 1, 1, 8, 16),
    Load(1, 4, 7, 8, 8),
    Load(7, 1, 4, 40, 8, "dropped"),
    Load(3, 2, 4, 8, 8, "all dropped"),
]


def inputs(load, activation, dtype):
    """(x, gates, w_in, w_out) that want gradients, and the plan."""
    rng = np.random.default_rng(3)
    expert_N = load.experts_N()
    rows = 2 * load.hidden if activation == "swiglu" else load.hidden
    arrays = (
        rng.standard_normal((load.tokens, load.width)),
        np.where(expert_N < load.experts, rng.uniform(0.1, 1, len(expert_N)), 0),
        rng.normal(0, load.width**-0.5, (load.experts, rows, load.width)),
        rng.normal(0, load.hidden**-0.5, (load.experts, load.width, load.hidden)),
    )
    kinds = dtype, torch.float64 if dtype == torch.float64 else torch.float32, dtype, dtype
    leaves = [torch.tensor(x).to(kind).requires_grad_() for x, kind in zip(arrays, kinds, strict=True)]
    return leaves, plan_of(CPU, expert_N, load.choices, load.experts)


def composed(load, activation, dtype):
    """Value and gradients of the default composition in float64, for inputs as they are in a type."""
    leaves, plan = inputs(load, activation, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    compose: Any = Ops.routed_mlp
    return of(compose(CPU, wide[0], wide[1], plan, *wide[2:], activation), wide)


def fused(load, activation, dtype, form, whole=None):
    """The same of a form of the block."""
    (x, gate_N, w_in, w_out), plan = inputs(load, activation, dtype)
    whole = load.whole if whole is None else whole
    layout = Layout(ends(plan.counts_E), whole, plan.order_R, plan.position_N, load.choices)
    return of(expert_block(x, gate_N, w_in, w_out, layout, activation, form), [x, gate_N, w_in, w_out])


def rows_composed(load, activation, dtype):
    """Value and gradients of `grouped_mlp` in float64, on as many rows as there are assignments."""
    (x, *_, w_in, w_out), plan = row_inputs(load, activation, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, w_in, w_out)]
    compose: Any = Ops.grouped_mlp
    return of(compose(CPU, *wide, plan.counts_E, activation), wide)


def rows_fused(load, activation, dtype, form):
    """The same of a form of the block; rows without an expert hold NaN."""
    (x, *_, w_in, w_out), plan = row_inputs(load, activation, dtype)
    with torch.no_grad():
        x[int(plan.counts_E.sum()) :] = NAN
    layout = Layout(ends(plan.counts_E), load.whole)
    return of(expert_block(x, None, w_in, w_out, layout, activation, form), [x, w_in, w_out])


def row_inputs(load, activation, dtype):
    (x, *rest), plan = inputs(load, activation, dtype)
    return [x.detach()[plan.token_R].clone().requires_grad_(), *rest], plan


def ends(counts_E):
    return counts_E.cumsum(0, dtype=torch.int32)


def of(y, leaves):
    weights = torch.tensor(np.random.default_rng(5).standard_normal(tuple(y.shape)))
    total = (y.double() * weights).sum()
    if not total.requires_grad:  # no expert has a row
        return [y, *map(torch.zeros_like, leaves)]
    return [y.detach(), *torch.autograd.grad(total, leaves)]


def wrong(found, expected, tolerance):
    """By how much any differs, relative to the largest; None if none by more than the tolerance."""
    for index, (got, want) in enumerate(zip(found, expected, strict=True)):
        got, want = got.detach(), want.detach()
        assert got.shape == want.shape
        error = float((got.double() - want).abs().max()) / max(float(want.abs().max()), 1e-30)
        if not error <= tolerance and not (got == want).all():
            return f"array {index} is off by {error:.1e}"
    return None


def careless(a, b, ends_E):
    """A grouped product from plain ones that leaves NaN wherever torch's leaves what was in memory."""
    stops, experts = ends_E.tolist(), len(ends_E)
    starts = [0, *stops[:-1]]
    if b.dim() == 3:
        out = a.new_full((a.shape[0], b.shape[2]), NAN)
        for expert in range(experts):
            rows = slice(starts[expert], stops[expert])
            out[rows] = a[rows] @ b[expert]
        return out
    out = a.new_full((experts, a.shape[0], b.shape[1]), NAN)
    for expert in range(experts):
        rows = slice(starts[expert], stops[expert])
        if starts[expert] < stops[expert]:
            out[expert] = a[:, rows] @ b[rows]
    return out


def careless_stages(passes):
    return stages.GroupedStages(passes, careless)
