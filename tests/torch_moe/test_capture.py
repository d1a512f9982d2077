"""torch.compile makes one graph of a layer; other ways to capture it are refused in one sentence."""

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moeport.errors import UserError
from moeport.routers import ROUTERS
from tests.torch_moe.layers import EXTRAS, STATEFUL, inputs, make

SOON = ("topk",)
"""Routers that are compiled whenever the tests run; the others in the slow sweep."""
POLICIES = {
    "random drops": {"capacity": {"policy": "factor", "drop": "random"}},
    "estimated": STATEFUL["both"],
    "affinity": {"router": "locmoe", "capacity": {"policy": "factor", "drop": "affinity"}},
    "extras": EXTRAS | {"load_balance": {"scope": "sequence", "coefficient": 0.1}},
}
CASES = [
    *(pytest.param({"router": r}, id=r, marks=[] if r in SOON else [pytest.mark.slow]) for r in ROUTERS),
    *(pytest.param(options, id=name, marks=[pytest.mark.slow]) for name, options in POLICIES.items()),
]


def results(function, layer, *arguments):
    """What one training call gives: output, loss, gradients, and what the router state will follow."""
    torch.manual_seed(1)
    layer.zero_grad()
    arguments[0].grad = None
    y = function(*arguments)
    (y.square().sum() + layer.auxiliary_loss).backward()
    sums, layer._sums = layer._sums or (), None
    return [y, layer.auxiliary_loss, arguments[0].grad, *(p.grad for p in layer.parameters()), *sums]


@pytest.mark.parametrize("options", CASES)
def test_one_graph_for_all_numbers_of_tokens(options):
    torch._dynamo.reset()
    layer = make(**options, seed=0)
    counter = CompileCounterWithBackend("aot_eager" if layer.layer.config.router.name in SOON else "eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length in (5, 6, 9):
        arguments = inputs(layer, 2, length)
        found, expected = (results(function, layer, *arguments) for function in (compiled, layer))
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("order", ["checkpoint of compiled", "compiled checkpoint"])
def test_a_compiled_call_that_is_recomputed_counts_once(order):
    torch._dynamo.reset()
    layer = make("sigmoid_bias")
    if order == "compiled checkpoint":
        function = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="eager")
    else:
        compiled = torch.compile(layer, backend="eager")

        def function(x):
            return checkpoint(compiled, x, use_reentrant=False)

    for calls in (1, 2):
        function(*inputs(layer, 2, 6)).sum().backward()
        assert layer._sums[0].sum() == calls * 2 * 6 * 2


def test_the_grouped_operation_is_right_as_torch_checks_it():
    from moeport.backends.torch.kernels import grouped_mlp_operation

    x, w_in, w_out = (torch.randn(shape).requires_grad_() for shape in ((7, 4), (3, 6, 4), (3, 4, 3)))
    torch.library.opcheck(grouped_mlp_operation, (x, w_in, w_out, torch.tensor([3, 0, 2]), "swiglu"))


def trace(layer, x):
    torch.jit.trace(layer, x)


def script(layer, x):
    torch.jit.script(layer)


def export(layer, x):
    torch.export.export(layer, (x,))


def onnx(layer, x):
    torch.onnx.export(layer, (x,), "unused.onnx", dynamo=False)


def symbolic(layer, x):
    torch.fx.symbolic_trace(layer)


def mapped(layer, x):
    torch.func.vmap(layer)(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("capture", [trace, script, export, onnx, symbolic, mapped])
def test_other_captures_are_refused_in_one_sentence(capture, inside):
    layer = make().eval()
    (x,) = inputs(layer, 2, 3, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            UserError, match=r"^moeport\.torch\.MoE cannot (be captured by|run under)[^.]*torch\.\w+[^\n]*; \w"
        ) as e:
            capture(nn.Sequential(nn.Identity(), layer) if inside else layer, x)
    assert "\n" not in str(e.value)


def test_strict_export_shows_the_same_sentence():
    layer = make().eval()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"moeport\.torch\.MoE cannot be captured by torch\.export"):
        torch.export.export(layer, inputs(layer, 2, requires_grad=False), strict=True)
