"""The forms of an expert block on a GPU: values, gradients, what they hold, and that nothing waits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moeport.backends.torch.cuda import kernels
from moeport.backends.torch.cuda.recorder import CudaRecorder
from moeport.backends.torch.fused import FusedOps, operations
from moeport.backends.torch.ops import TorchOps
from moeport.errors import BackendUnavailableError
from tests.cuda.cases import LOADS, Load, composed, inputs, of, wrong

pytestmark = pytest.mark.cuda

FORMS = [candidate.fact.name for candidate in kernels.CANDIDATES if candidate.fact.kernel == "routed_mlp"]
LARGE = Load(2048, 8, 33, 256, 384)


def there(plan):
    """The plan on the device."""
    arrays = ("order_R", "position_N", "token_R", "counts_E")
    return replace(plan, **{name: getattr(plan, name).cuda() for name in arrays})


def with_form(form) -> Any:
    """Operations with one form; skips where it cannot run."""
    ops = FusedOps(torch.device("cuda"), kernels.CANDIDATES, {"routed_mlp": form})
    try:
        ops.choice("routed_mlp", "bfloat16")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return ops


def on_gpu(load, activation="swiglu"):
    leaves, plan = inputs(load, activation, torch.bfloat16)
    return [x.detach().cuda().requires_grad_() for x in leaves], there(plan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("load", [*LOADS, LARGE], ids=str)
def test_values_and_gradients(load, form):
    ops = with_form(form)
    (x, gate_N, *weights), plan = on_gpu(load)
    if ops.choice("routed_mlp", "bfloat16").candidate.limit(x, gate_N, plan, *weights, "swiglu"):
        return  # it would be refused
    y = ops.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    found = [array.cpu() for array in of(y.cpu(), [x, gate_N, *weights])]
    assert wrong(found, composed(load, "swiglu", torch.bfloat16), 2**-5) is None


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_device(form):
    ops = with_form(form)
    (x, gate_N, *weights), plan = on_gpu(LARGE)

    def step():
        ops.routed_mlp(x, gate_N, plan, *weights, "swiglu").backward(x.detach())

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "sonicmoe"])
def test_it_holds_what_it_must_and_gives_the_same_bits(form):
    ops = with_form(form)
    (x, gate_N, *weights), plan = on_gpu(LARGE)
    first = of(ops.routed_mlp(x, gate_N, plan, *weights, "swiglu").cpu(), [x, gate_N, *weights])
    before = torch.cuda.memory_allocated()
    y = ops.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    rows = LARGE.tokens * LARGE.choices
    held = torch.cuda.memory_allocated() - before
    assert held <= 1.05 * (y.nbytes + 2 * rows * 2 * LARGE.hidden) + 2**16
    again = of(y.cpu(), [x, gate_N, *weights])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_recording_that_fails_leaves_the_stream_as_it_was():
    recorder, before = CudaRecorder(), torch.cuda.current_stream()
    x = torch.ones(4, device="cuda")

    def waits() -> Any:
        return x.sum().item()

    with pytest.raises(RuntimeError):
        recorder.record(waits)
    assert torch.cuda.current_stream() == before
    assert float(x.sum()) == 4


def test_the_choice_is_said_and_time_makes_it():
    ops: Any = operations(torch.device("cuda"))
    (x, gate_N, *weights), plan = on_gpu(Load(8192, 8, 64, 1024, 512))
    y = ops.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    plain: Any = TorchOps(torch.device("cuda"))
    expected = plain.routed_mlp(x, gate_N, plan, *weights, "swiglu")
    assert wrong([y.cpu()], [expected.cpu()], 2**-5) is None
