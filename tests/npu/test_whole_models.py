"""Whole models on the NPU: by shapes alone, through the real meta kernels, and by values, through the emulated ones."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moeport.backends.torch.npu.operators import OPERATORS
from tests.model.models import VOCABULARY
from tests.npu.emulation import calls
from tests.npu.models import KINDS, backend, built
from tests.npu.recorded import recorded
from tests.npu.schemas import Release, pinned

PINNED = pinned()
SAME_AS_CPU = (
    "router topk",
    "router sigmoid_bias",
    "capacity",
    "one expert",
    "shared experts",
    "a dense block",
    "a rotary base for each key head",
    "latent attention",
)


def assert_all_have_gradients(training):
    for name, parameter in training.module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found = parameter.grad.shape, parameter.grad.dtype, parameter.grad.device
        assert found == (parameter.shape, parameter.dtype, parameter.device), name


def assert_takes_a_step_by_shapes(kind, dtype, **options):
    """Forward, backward and optimiser step of tensors without values."""
    training, batch = built(kind, backend("npu", dtype), **options)
    terms = training.accumulate(batch, 1.0)
    assert (terms.loss.shape, terms.loss.dtype, terms.loss.device.type) == ((), torch.float32, "npu")
    assert_all_have_gradients(training)
    norm = training.gradient_norm()
    assert norm.shape == ()
    training.step(0.1, norm)
    logits = training.module.logits(training.on_device(batch).token_BS)
    assert (logits.shape, logits.device.type) == ((*batch.token_BS.shape, VOCABULARY), "npu")
    return logits.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_in_float32(kind):
    backend("npu", "float32")
    with FakeTensorMode():
        assert assert_takes_a_step_by_shapes(kind, "float32") == torch.float32


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=str)
def test_shapes_in_bfloat16(options):
    backend("npu", "bfloat16")
    with FakeTensorMode():
        assert assert_takes_a_step_by_shapes("router topk", "bfloat16", **options) == torch.bfloat16


@pytest.fixture(scope="module")
def made():
    """The calls of torch_npu's operators that one step makes from Python."""
    training, batch = built("capacity", backend("npu", "float32"))
    with pytest.MonkeyPatch.context() as monkeypatch, recorded(monkeypatch) as calls_made:
        training.accumulate(batch, 1.0)
    return calls_made


def test_a_step_calls_every_operator_of_the_adapter(made):
    assert {name for name, _, _ in made} == set(OPERATORS)


@pytest.mark.parametrize("release", PINNED)
def test_every_call_fits_the_schemas_of_every_release(made, release):
    operators = Release(f"{release}.adapter", PINNED[release])
    for name, args, kwargs in made:
        operators.take(name, args, kwargs)


@pytest.mark.parametrize("kind", SAME_AS_CPU)
def test_every_gradient_is_that_of_the_cpu(kind):
    found = {}
    for device in ("npu", "cpu"):
        training, batch = built(kind, backend(device))
        terms = training.accumulate(batch, 1.0)
        assert_all_have_gradients(training)
        found[device] = [terms.loss.cpu(), *(p.grad.cpu() for p in training.module.parameters())]
        assert all(gradient.ne(0).any() for gradient in found[device])
    torch.testing.assert_close(found["npu"], found["cpu"], rtol=1e-4, atol=1e-5)


def test_what_ran_was_fused():
    training, batch = built("router topk", backend("npu"))
    before = calls.copy()
    terms = training.accumulate(batch, 1.0)
    training.step(0.1, training.gradient_norm())
    assert terms.loss.isfinite()
    ran = {name.removeprefix("npu::") for name in calls if calls[name] > before[name]}
    backward = {"npu_rms_norm_backward", "npu_rotary_mul_backward", "npu_swiglu_backward", "npu_fusion_attention_grad"}
    backward |= {"npu_moe_token_permute_grad_v2", "npu_moe_token_unpermute_grad_v2"}
    forward = {"_npu_moe_token_unpermute" if name == "npu_moe_token_unpermute" else name for name in OPERATORS}
    assert ran >= forward | backward | {"aten::_fused_adamw_"}
