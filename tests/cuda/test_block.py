"""The node of autograd for experts on CUDA, in plain PyTorch on the CPU: values, gradients and what it holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moeport.backends.torch.cuda import block, kernels, passes, stages
from moeport.backends.torch.cuda.block import expert_block
from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.fused import FusedOps
from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import Ops
from moeport.errors import BackendUnavailableError, MoeportError, UserError
from tests.cuda.cases import (
    CPU,
    LOADS,
    Load,
    careless_stages,
    composed,
    ends,
    fused,
    inputs,
    rows_composed,
    rows_fused,
    wrong,
)

ACTIVATIONS = ("swiglu", "gelu")
SETTING = {"routed_mlp": "grouped_mm", "grouped_mlp": "grouped_mm"}


@pytest.fixture
def careless(monkeypatch):
    """A form whose products leave NaN where they may leave anything, in any type."""
    monkeypatch.setitem(stages.FORMS, "careless", lambda: careless_stages(passes))
    stages.stages_of.cache_clear()
    yield "careless"
    stages.stages_of.cache_clear()


def on_cpu(setting=None) -> Any:
    """The operations of CUDA's table, on the CPU, where torch has a grouped product too."""
    candidates = [candidate for candidate in kernels.CANDIDATES if candidate.fact.kernel in SETTING]
    return FusedOps(torch.device("cpu"), candidates, setting or SETTING)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("load", LOADS, ids=str)
def test_values_and_gradients_are_those_of_the_composition(load, activation, careless):
    expected = composed(load, activation, torch.float64)
    assert wrong(fused(load, activation, torch.float64, careless), expected, 1e-12) is None
    assert wrong(fused(load, activation, torch.float64, careless, whole=False), expected, 1e-12) is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("load", LOADS, ids=str)
def test_rows_from_elsewhere_too(load, activation, careless):
    expected = rows_composed(load, activation, torch.float64)
    assert wrong(rows_fused(load, activation, torch.float64, careless), expected, 1e-12) is None


@pytest.mark.parametrize("load", [load for load in LOADS if load.tokens > 1], ids=str)
def test_torch_s_grouped_product_in_bfloat16(load):
    expected = composed(load, "swiglu", torch.bfloat16)
    assert wrong(fused(load, "swiglu", torch.bfloat16, "grouped_mm"), expected, 2**-6) is None


def test_a_row_that_is_taken_for_served_shows():
    """So the tests above would find a mask that is missing."""
    load = Load(12, 2, 5, 24, 40, "dropped")
    stages.FORMS["careless"] = lambda: careless_stages(passes)
    try:
        found = fused(load, "swiglu", torch.float64, "careless", whole=True)
    finally:
        del stages.FORMS["careless"]
        stages.stages_of.cache_clear()
    assert all(x.isnan().any() for x in found[:3])


def test_it_keeps_tokens_hidden_states_gates_and_indices_and_nothing_else():
    load = Load(64, 2, 4, 32, 48)
    (x, gate_N, w_in, w_out), plan = inputs(load, "swiglu", torch.bfloat16)
    layout = Layout(ends(plan.counts_E), True, plan.order_R, plan.position_N, load.choices)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_block(x, gate_N, w_in, w_out, layout, "swiglu", "grouped_mm")
    rows = load.tokens * load.choices
    least = 2 * load.tokens * load.width + 2 * rows * 2 * load.hidden + 4 * rows
    indices = sum(t.nbytes for t in (plan.order_R, plan.position_N, layout.ends_E))
    assert sum(kept.values()) == least + indices + w_in.nbytes + w_out.nbytes


def test_the_table_passes_its_trial_and_serves_a_layer(monkeypatch):
    ops = on_cpu()
    assert {kernel: choice.label for kernel, choice in ops.prepare("bfloat16").items()} == SETTING
    ran = []

    def run(x, *rest):
        ran.append(rest[-1])
        return x

    monkeypatch.setattr(block.ExpertBlock, "apply", run)
    (x, gate_N, w_in, w_out), plan = inputs(LOADS[0], "swiglu", torch.bfloat16)
    ops.routed_mlp(x, gate_N, plan, w_in, w_out, "swiglu")
    ops.grouped_mlp(x[plan.token_R], w_in, w_out, plan.counts_E, "swiglu")
    assert ran == ["grouped_mm", "grouped_mm"]


def test_float32_is_computed_as_before():
    ops = on_cpu("auto")
    (x, gate_N, w_in, w_out), plan = inputs(LOADS[0], "swiglu", torch.float32)
    expected = TorchOps(torch.device("cpu")).routed_mlp(x, gate_N, plan, w_in, w_out, "swiglu")
    assert torch.equal(ops.routed_mlp(x, gate_N, plan, w_in, w_out, "swiglu"), expected)
    assert not ops.fuses("routed_mlp", "float32")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (Load(4, 2, 3, 12, 16), "the widths are 12 and 16; expected multiples of 8"),
        (Load(4, 2, 3, 16, 20), "the widths are 16 and 20; expected multiples of 8"),
        (Load(4, 2, 1024, 8, 8), "there are 1024 experts; expected fewer than 1024"),
    ],
    ids=str,
)
def test_what_is_beyond_the_product_is_composed_and_said(load, reason):
    ops = on_cpu("auto")
    leaves, plan = inputs(load, "swiglu", torch.bfloat16)
    x, gate_N, *weights = leaves
    y = ops.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    assert torch.equal(y, CPU.routed_mlp(x, gate_N, plan, *weights, "swiglu"))
    assert ops.given_way["routed_mlp"] == ops.given_way["grouped_mlp"] == reason
    with pytest.raises(BackendUnavailableError, match=f"routed_mlp: grouped_mm: {reason}; set routed_mlp to auto"):
        on_cpu().routed_mlp(x, gate_N, plan, *weights, "swiglu")


def test_experts_that_choose_have_their_rows_computed(monkeypatch):
    ops = on_cpu("auto")
    (x, gate_N, *weights), plan = inputs(LOADS[0], "swiglu", torch.bfloat16)
    plan = replace(plan, choices_per_token=None)
    compose: Any = Ops.routed_mlp
    expected = compose(CPU, x.double(), gate_N.double(), plan, *(w.double() for w in weights), "swiglu")
    found = ops.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    assert wrong([found], [expected], 2**-6) is None
    assert ops.given_way == {"routed_mlp": "experts choose tokens, or rows are rounded; expected K rows per token"}


def test_second_derivatives_are_refused_and_transforms_take_the_composition():
    ops = on_cpu()
    (x, gate_N, *weights), plan = inputs(LOADS[0], "swiglu", torch.bfloat16)
    y = ops.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    with pytest.raises(UserError, match="grouped_mm has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient = torch.func.grad(lambda x: ops.routed_mlp(x, gate_N, plan, *weights, "swiglu").float().sum())
    assert gradient(x.detach()).shape == x.shape


@pytest.mark.parametrize(
    ("form", "capability", "expected"),
    [("grouped_mm", (8, 0), "9 or 10"), ("grouped_mm_triton", (12, 0), "9 or 10"), ("triton", (7, 5), "8 or later")],
)
def test_a_device_without_the_product_is_refused(monkeypatch, form, capability, expected):
    """torch's grouped product falls back to a loop there, for which it reads the offsets on the host."""
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    found = ".".join(map(str, capability))
    with pytest.raises(MoeportError, match=f"needs compute capability {expected}; this device has {found}"):
        kernels.require(form, torch.device("cuda", 0))
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0))
    kernels.require(form, torch.device("cuda", 0))


def test_a_compiled_graph_has_it_as_one_operation():
    ops = on_cpu()
    ops.prepare("bfloat16")
    leaves, plan = inputs(LOADS[1], "swiglu", torch.bfloat16)

    def run(x, gate_N, w_in, w_out):
        return ops.routed_mlp(x * 1, gate_N, plan, w_in, w_out, "swiglu") * 2

    expected = torch.autograd.grad(run(*leaves).float().sum(), leaves)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    y = compiled(*leaves)
    assert torch.equal(y, run(*leaves))
    for got, want in zip(torch.autograd.grad(y.float().sum(), leaves), expected, strict=True):
        assert torch.equal(got, want)


def test_operations_keep_their_promises_to_the_compiler():
    (x, gate_N, w_in, w_out), plan = inputs(LOADS[1], "swiglu", torch.bfloat16)
    for layout, gates, of in (
        (Layout(ends(plan.counts_E), False, plan.order_R, plan.position_N, 2), gate_N, x),
        (Layout(ends(plan.counts_E), False), None, x.detach()[plan.token_R].clone().requires_grad_()),
    ):
        arguments = (of, gates, w_in, w_out, layout.ends_E, layout.order_R, layout.position_N)
        torch.library.opcheck(
            block._operation,
            (*arguments, layout.whole, layout.choices, "swiglu", "grouped_mm"),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
