"""A fused form is used only where it gives the values and gradients of the composition."""

from functools import partial
from typing import Any

import pytest
import torch

from moeport.backends.examples import EXAMPLES
from moeport.backends.torch import fused
from moeport.backends.torch.adamw_trial import step_fault
from moeport.backends.torch.fused import FusedOps, operations, own_operations
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import Candidate, serves_all
from moeport.core.ops import Ops
from moeport.errors import BackendUnavailableError, UserError
from moeport.facts import FusedKernel
from tests.support import assert_close, grid

CPU = torch.device("cpu")
FACT = FusedKernel("swiglu", "my_swiglu", ("float32", "bfloat16"))


def right(ops, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def zeros(ops, gate_up):
    return right(ops, gate_up) * 0


def too_large(ops, gate_up):
    return right(ops, gate_up) * 1.05


def transposed_gate(ops, gate_up):
    return right(ops, gate_up.roll(gate_up.shape[-1] // 2, -1))


def narrow(ops, gate_up):
    return right(ops, gate_up)[:, :1]


def without_gradient(ops, gate_up):
    return right(ops, gate_up.detach())


def half_the_gradient(ops, gate_up):
    y = right(ops, gate_up)
    return y / 2 + y.detach() / 2


def raising(ops, gate_up):
    raise RuntimeError("error code is 507899\nand a long story")


def warning(ops, gate_up):
    torch.warnings.warn("npu::f: an autograd kernel was not registered", stacklevel=1)
    return right(ops, gate_up)


def ops_with(function, setting="auto", limit=serves_all):
    return FusedOps(CPU, (Candidate(FACT, function, limit),), setting)


REFUSED = {
    zeros: "is wrong on this device by 1.0e+00",
    too_large: "is wrong on this device by ",
    transposed_gate: "is wrong on this device by ",
    narrow: "is wrong on this device: of the shape (8, 1) instead of (8, 64)",
    without_gradient: "has no gradient of its argument 1 on this device",
    half_the_gradient: "is wrong on this device by 5.0e-01",
    raising: "fails on this device: error code is 507899",
    warning: "has no gradient on this device, as a warning says",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_one_that_differs_is_left_out_and_the_reason_is_said(function, dtype):
    choice = ops_with(function).choice("swiglu", dtype)
    assert choice.candidate is None
    assert choice.label.startswith(f"my_swiglu {REFUSED[function]}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_that_agrees_is_used(dtype):
    used = []

    def counted(ops, gate_up):
        used.append(gate_up)
        return right(ops, gate_up)

    ops = ops_with(counted)
    assert ops.choice("swiglu", dtype).label == "my_swiglu"
    used.clear()
    x = torch.tensor(grid(0, 3, 8), dtype=getattr(torch, dtype))
    assert_close(ops.swiglu(x).float(), TorchOps(CPU).swiglu(x).float(), 2**-7)
    assert len(used) == 1
    assert ops.swiglu(x[:0]).shape == (0, 4)
    assert len(used) == 1, "there is nothing to compute"


def test_it_does_not_compute_in_types_that_its_documentation_leaves_out():
    assert ops_with(right).choice("swiglu", "float64").label == "my_swiglu does not compute in float64"


def test_default_tries_nothing():
    assert ops_with(raising, "default").choice("swiglu", "float32").label == "as backend.kernels says"
    assert ops_with(raising, {"swiglu": "default"}).choice("swiglu", "float32").candidate is None


def test_one_that_is_named_must_pass():
    with pytest.raises(BackendUnavailableError, match=r"swiglu: my_swiglu fails .* set swiglu to auto or default$"):
        ops_with(raising, {"swiglu": "my_swiglu"}).prepare("float32")
    ops_with(right, {"swiglu": "my_swiglu"}).prepare("float32")


def test_of_several_the_first_that_passes_is_used():
    other = FusedKernel("swiglu", "other", ("float32",))
    ops = FusedOps(CPU, (Candidate(FACT, raising), Candidate(other, right)), "auto")
    assert ops.choice("swiglu", "float32").label == "other"
    named = FusedOps(CPU, (Candidate(FACT, right), Candidate(other, right)), {"swiglu": "other"})
    assert named.choice("swiglu", "float32").label == "other"


def test_what_it_cannot_serve_goes_to_the_composition_and_is_said():
    def limit(gate_up):
        return "there are 6 columns; expected 8" if gate_up.shape[-1] == 6 else None

    ops = ops_with(right, limit=limit)
    x = torch.tensor(grid(0, 3, 6), dtype=torch.float32)
    assert ops.describe({"swiglu": "silu"}, "float32") == {"swiglu": "my_swiglu"}
    assert torch.equal(ops.swiglu(x), TorchOps(CPU).swiglu(x))
    said = ops.describe({"swiglu": "silu"}, "float32")["swiglu"]
    assert said == "my_swiglu; where it cannot serve (there are 6 columns; expected 8): silu"
    named = ops_with(right, {"swiglu": "my_swiglu"}, limit)
    with pytest.raises(BackendUnavailableError, match="my_swiglu: there are 6 columns; expected 8; set swiglu to auto"):
        named.swiglu(x)


def test_limits_are_known_before_a_model_runs():
    ops = ops_with(right, limit=lambda gate_up: "too wide")
    ops.foresee("float32", {"swiglu": (torch.empty(1, 2, device="meta"),), "rope": ()})
    assert "too wide" in ops.describe({"swiglu": "silu"}, "float32")["swiglu"]


def test_the_trial_is_out_of_reach_of_the_modes_around_a_call():
    x = torch.tensor(grid(0, 3, 8), dtype=torch.float32)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        ops = ops_with(right)
        with mode:
            ops.swiglu(x)
        assert ops.choice("swiglu", "float32").label == "my_swiglu"
    packed = []

    def pack(x):
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops_with(right).choice("swiglu", "float32")
    assert not packed


def test_second_derivatives_are_refused():
    """Those of torch-npu's operators would be missing without an error."""
    x = torch.tensor(grid(0, 3, 8), dtype=torch.float32, requires_grad=True)
    ops = ops_with(right)
    (gradient,) = torch.autograd.grad(ops.swiglu(x).sum(), x)
    assert gradient.shape == x.shape
    with pytest.raises(UserError, match=r"my_swiglu has no second derivative; .* {swiglu: default}"):
        torch.autograd.grad(ops.swiglu(x).sum(), x, create_graph=True)


def test_transforms_take_the_composition():
    def strict(ops, gate_up):
        assert torch._C._functorch.peek_interpreter_stack() is None
        return right(ops, gate_up)

    ops, x = ops_with(strict), torch.tensor(grid(0, 3, 8), dtype=torch.float32)
    ops.prepare("float32")
    gradient = torch.func.grad(lambda x: ops.swiglu(x).square().sum())(x)
    expected = torch.func.grad(lambda x: TorchOps(CPU).swiglu(x).square().sum())(x)
    assert torch.equal(gradient, expected)


def test_a_device_without_a_table_has_plain_operations(monkeypatch):
    monkeypatch.delitem(fused.TABLES, "cpu")
    assert type(operations(CPU)) is TorchOps
    assert type(operations(CPU, {"swiglu": "default"})) is TorchOps
    with pytest.raises(
        BackendUnavailableError, match="swiglu: cpu has no operator named npu_swiglu; set swiglu to auto"
    ):
        operations(CPU, {"swiglu": "npu_swiglu"})


def test_a_table_needs_no_more_than_its_candidates(monkeypatch):
    """So a device gets fused kernels by a module and a line in TABLES."""
    monkeypatch.setitem(fused.TABLES, "cpu", __name__)
    monkeypatch.setattr(fused, "_made", {})
    ops = operations(CPU)
    assert isinstance(ops, FusedOps)
    assert ops.choice("swiglu", "float32").label == "my_swiglu"
    assert operations(CPU) is ops
    assert operations(CPU, {"swiglu": "default"}) is not ops


def test_what_serves_one_model_is_not_said_of_another(monkeypatch):
    monkeypatch.setitem(fused.TABLES, "cpu", __name__)
    monkeypatch.setattr(fused, "_made", {})
    first: Any = own_operations(CPU)
    first.choice("swiglu", "float32")
    first.given_way["swiglu"] = "it is too wide"
    second: Any = own_operations(CPU)
    assert second.choices is first.choices
    assert "too wide" not in str(second.describe({"swiglu": "composed"}, "float32"))


CANDIDATES = (Candidate(FACT, right),)


@pytest.mark.parametrize("kernel", EXAMPLES)
def test_the_composition_of_ops_passes_every_trial(kernel):
    """The examples are valid, and the kernels of the backend are found to be what they are."""
    fact = FusedKernel(kernel, "composition", ("float32", "bfloat16", "float16", "float64"))
    ops = FusedOps(CPU, (Candidate(fact, getattr(Ops, kernel)),), "auto")
    for dtype in fact.dtypes:
        assert ops.choice(kernel, dtype).label == "composition"


@pytest.mark.parametrize("lost", ["w_in", "w_out"])
def test_a_missing_weight_gradient_is_found(lost):
    def grouped_mlp(ops, x, w_in, w_out, counts, activation):
        held = {"w_in": w_in, "w_out": w_out}
        held[lost] = held[lost].detach()
        return Ops.grouped_mlp(ops, x, held["w_in"], held["w_out"], counts, activation)

    fact = FusedKernel("grouped_mlp", "grouped", ("float32",))
    choice = FusedOps(CPU, (Candidate(fact, grouped_mlp),), "auto").choice("grouped_mlp", "float32")
    number = 2 if lost == "w_in" else 3
    assert choice.label == f"grouped has no gradient of its argument {number} on this device"


def test_a_fused_step_is_compared_with_the_loop():
    fact = FusedKernel("adamw", "fused", ("float32",))

    def fault(**options):
        return step_fault(Candidate(fact, partial(torch.optim.AdamW, **options)), CPU, "float32")

    assert fault(fused=True) is None
    assert fault(fused=True, maximize=True).startswith("is wrong on this device by ")
    assert fault(fused=True, foreach=True).startswith("fails on this device: ")
    assert step_fault(Candidate(fact, torch.optim.AdamW), CPU, "float64") == "does not compute in float64"
