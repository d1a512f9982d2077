"""The forms of the experts on a CPU give what the composition gives, for every load."""

from typing import Any

import numpy as np
import pytest
import torch

from moeport.backends.examples import differentiated_among, plan_of
from moeport.backends.torch.cpu import block
from moeport.backends.torch.cpu.block import RoutedMLP
from moeport.backends.torch.cpu.kernels import CANDIDATES
from moeport.backends.torch.cpu.rows import lay_out, unit_for
from moeport.backends.torch.fused import FusedOps, operations
from moeport.backends.torch.ops import DTYPES, TorchOps
from moeport.core.dispatch_plan import DispatchPlan
from tests.support import assert_close

CPU = torch.device("cpu")
PLAIN = TorchOps(CPU)
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-12}
T, D, F = 24, 8, 16
LOADS: dict[str, tuple[int, list[int]]] = {
    "even": (4, [e for t in range(T) for e in (t % 4, (t + 1) % 4)]),
    "an expert without rows": (4, [e for t in range(T) for e in (0, 2 + t % 2)]),
    "all on one": (3, [1] * T),
    "one expert": (1, [0] * T),
    "unrouted": (3, [e for t in range(T) for e in (t % 4, 3 if t % 3 else 1)]),
    "none routed": (3, [3] * T),
    "skewed": (4, [e for t in range(T) for e in (0, (t % 7) // 2 if t % 7 > 1 else 1)]),
}
"""By name: experts, and the expert of each assignment; the number of experts means unrouted."""


def layer(load, activation="swiglu", dtype="float32", tokens=T):
    """The arguments of routed_mlp; what no expert serves is NaN, where a token is served by none."""
    experts, chosen = LOADS[load]
    choices = len(chosen) // T
    expert_N = np.array(chosen[: tokens * choices], int)
    random, kind = np.random.default_rng(0), DTYPES[dtype]
    height = 2 * F if activation == "swiglu" else F
    x, w_in, w_out = (
        torch.tensor(random.standard_normal(shape), dtype=kind) * 0.5
        for shape in ((tokens, D), (experts, height, D), (experts, D, F))
    )
    served = (expert_N < experts).reshape(tokens, choices)
    x[torch.tensor(~served.any(1))] = float("nan")
    gates = torch.tensor(np.where(served.reshape(-1), random.uniform(0.1, 1, len(expert_N)), 0))
    weight_N = gates.to(torch.float64 if dtype == "float64" else torch.float32)
    return [x, weight_N, plan_of(PLAIN, expert_N, choices, experts), w_in, w_out, activation]


def grouped(arguments):
    """The arguments of grouped_mlp for the same rows."""
    x_TD, _, plan, w_in, w_out, activation = arguments
    return [x_TD[plan.token_R], w_in, w_out, plan.counts_E, activation]


def results(form, arguments, **options):
    """Value, gradients, and the leaves that they belong to."""
    given = list(arguments)
    places = [i for i in differentiated_among(given, 4) if torch.is_tensor(given[i]) and given[i].is_floating_point()]
    for i in places:
        given[i] = given[i].detach().requires_grad_()
    y = form(PLAIN, *given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    leaves = [given[i] for i in places]
    return y, torch.autograd.grad((y * weights).sum(), leaves, materialize_grads=True, **options), leaves


def reference(kernel):
    return lambda ops, *arguments: getattr(TorchOps, kernel)(ops, *arguments)


CASES = [(load, "swiglu", dtype) for load in LOADS for dtype in ("float32", "bfloat16")]
CASES += [("unrouted", "gelu", dtype) for dtype in TOLERANCE]


@pytest.mark.parametrize(
    ("candidate", "load", "activation", "dtype"),
    [
        pytest.param(each, *case, id="-".join([each.fact.kernel, each.fact.name, *case]))
        for each in CANDIDATES
        for case in CASES
        if case[-1] in each.fact.dtypes
    ],
)
def test_every_form_gives_what_the_composition_gives(candidate, load, activation, dtype):
    arguments = layer(load, activation, dtype)
    if candidate.fact.kernel == "grouped_mlp":
        arguments = grouped(arguments)
    y, gradients, _ = results(candidate.function, arguments)
    expected, expected_gradients, _ = results(reference(candidate.fact.kernel), arguments)
    assert y.dtype == DTYPES[dtype]
    for got, want in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert got.dtype == want.dtype
        assert_close(got.detach().double(), want.detach().double(), TOLERANCE[dtype])
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda each: f"{each.fact.kernel}-{each.fact.name}")
def test_second_derivatives_are_those_of_the_composition(candidate):
    dtype = "float64" if "float64" in candidate.fact.dtypes else "float32"
    arguments = layer("unrouted", "swiglu", dtype)
    arguments[0] = torch.nan_to_num(arguments[0])
    if candidate.fact.kernel == "grouped_mlp":
        arguments = grouped(arguments)

    def second(form):
        _, gradients, leaves = results(form, arguments, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in gradients), leaves)

    for got, want in zip(second(candidate.function), second(reference(candidate.fact.kernel)), strict=True):
        assert_close(got.double(), want.double(), 50 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_few_rows_give_the_same_bits_in_fewer_operations(monkeypatch, activation, dtype):
    for load in LOADS:
        for tokens in (1, 3, T):
            x, weight_N, plan, w_in, w_out, _ = layer(load, activation, dtype, tokens)
            found = []
            for limit in (block.SMALL, 0):
                monkeypatch.setattr(block, "SMALL", limit)
                y, _, hidden = RoutedMLP.compute(x, weight_N, w_in, w_out, plan, activation)
                found.append((y, hidden))
            monkeypatch.undo()
            for few, many in zip(*found, strict=True):
                assert torch.equal(few, many), (load, tokens)


def test_tokens_and_rows_may_be_none():
    """The operations never ask a form for nothing."""
    ops = operations(CPU)
    y = ops.routed_mlp(*layer("even", tokens=0))
    assert y.shape == (0, D)


def test_weights_that_are_not_trained_get_no_gradient():
    arguments = layer("even")
    x = arguments[0].requires_grad_()
    y = RoutedMLP.apply(x, arguments[1], *arguments[3:5], arguments[2], "swiglu")
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    assert gradient.shape == x.shape


def test_transforms_and_compiled_graphs_take_the_composition(monkeypatch):
    ops, arguments = operations(CPU), layer("even")
    ops.routed_mlp(*arguments)  # so that the choice is made

    def gradient(ops: Any) -> torch.Tensor:
        return torch.func.grad(lambda x: ops.routed_mlp(x, *arguments[1:]).square().sum())(arguments[0])

    assert torch.equal(gradient(ops), gradient(PLAIN))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert isinstance(ops, FusedOps)
    assert ops.serving("routed_mlp", arguments[0], arguments[1:], {}) is None


def test_the_first_form_is_used_and_others_can_be_named():
    first: Any = operations(CPU)
    assert first.choice("routed_mlp", "float32").label == "slices"
    arguments = layer("skewed")
    for name in ("slices", "padded_bmm"):
        ops: Any = operations(CPU, {"routed_mlp": name})
        assert ops.choice("routed_mlp", "float32").operator == name
        assert_close(ops.routed_mlp(*arguments), PLAIN.routed_mlp(*arguments), 2e-5)


@pytest.mark.parametrize("unit", [1, 4, 16])
@pytest.mark.parametrize("load", LOADS)
def test_rows_are_rounded_up_with_rows_of_the_same_expert(load, unit):
    experts, chosen = LOADS[load]
    plan: Any = plan_of(PLAIN, np.array(chosen), len(chosen) // T, experts)
    weight_N = torch.arange(1.0, len(chosen) + 1)
    rows = lay_out(plan, weight_N, unit)
    counts = np.bincount(chosen, minlength=experts)[:experts]
    assert [(expert, end - start) for expert, start, end in rows.slices] == [
        (expert, -(-count // unit) * unit) for expert, count in enumerate(counts) if count
    ]
    assert len(rows.token_P) == len(rows.gate_P) == rows.total == sum(end - start for _, start, end in rows.slices)
    choices = len(chosen) // T
    for expert, start, end in rows.slices:
        tokens = {n // choices for n, each in enumerate(chosen) if each == expert}
        assert set(rows.token_P[start:end].tolist()) == tokens
        assert int((rows.gate_P[start:end] > 0).sum()) == counts[expert]
    for n, expert in enumerate(chosen):
        place = int(rows.place_N[n])
        if expert == experts:
            assert place == rows.total
        else:
            assert (int(rows.token_P[place]), float(rows.gate_P[place])) == (n // choices, n + 1)


def test_rounding_adds_little_and_only_where_code_is_prepared():
    assert unit_for(65536, 64, torch.float32) == 1
    assert [unit_for(rows, 64, torch.bfloat16) for rows in (64, 65536 // 8, 65536, 2**20)] == [1, 8, 64, 64]


def test_the_limit_names_what_is_beyond_it():
    arguments = layer("even")
    arguments[2] = DispatchPlan(**{**vars(arguments[2]), "choices_per_token": None})
    limit = next(each.limit for each in CANDIDATES if each.fact.kernel == "routed_mlp")
    assert limit(*arguments) == "experts choose tokens, or rows are rounded; expected K rows per token"
    assert torch.equal(operations(CPU).routed_mlp(*arguments), PLAIN.routed_mlp(*arguments))
