"""`model.moe.router_dtype: compute`: operands in the compute type, everything after the product in float32."""

from types import SimpleNamespace

import numpy as np
import pytest

from moeport.config.model import MoELayerConfig
from moeport.model.moe import MoELayer
from tests.conformance.targets import Target
from tests.routers.catalogue import CONFIGS, EXAMPLES, EXPERTS_CHOOSE
from tests.routers.examples import WIDTH, build, hidden_states, label, placed_context, router_params

torch = pytest.importorskip("torch")

EVERY = [*CONFIGS, *EXPERTS_CHOOSE, *EXAMPLES["soft"]]


def logits_of(backend, config, in_compute_type):
    """The scores of a router whose operands have the compute type, or not."""
    ops, router = backend.ops, build(config)
    router.in_compute_type = in_compute_type
    params = {k: ops.cast(ops.from_numpy(v), backend.parameter_dtype) for k, v in router_params(router).items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), backend.dtype)
    chosen = router.route(ops, params, x_TD, placed_context(ops, router))
    assert ops.dtype(chosen.logits_TE) == "float32"
    return ops.to_numpy(chosen.logits_TE)


@pytest.mark.parametrize("config", EVERY, ids=label)
def test_in_float32_it_changes_nothing(config):
    backend = Target("torch", "cpu", "float32").build()
    assert np.array_equal(logits_of(backend, config, True), logits_of(backend, config, False))


@pytest.mark.parametrize("config", EVERY, ids=label)
def test_in_bfloat16_only_the_product_is_rounded(config):
    backend = Target("torch", "cpu", "bfloat16").build()
    rounded, exact = logits_of(backend, config, True), logits_of(backend, config, False)
    has_product = any(spec.name in ("weight", "projection") for spec in build(config).parameter_specs())
    assert np.array_equal(rounded, exact) is not has_product
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=2**-5 * np.abs(exact).max())


def test_the_layer_tells_its_router():
    for kind, told in (("float32", False), ("compute", True)):
        layer = MoELayer(MoELayerConfig.model_validate({"router_dtype": kind}), WIDTH, 0.02, 0.01)
        assert layer.router.in_compute_type is told


def test_the_node_of_the_wide_product_has_the_gradients_of_a_product():
    """On the CPU from float32 copies, which gives the sums that CUDA keeps."""
    from moeport.backends.torch.wide import WideLinear

    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    factor_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    out = WideLinear.apply(x, weight)
    (out * factor_TE.float()).sum().backward()
    rounded = weight.detach().bfloat16().float()
    assert torch.equal(out, x.detach().float() @ rounded.t())
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(x.grad.float(), factor_TE.float() @ rounded, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(weight.grad, factor_TE.float().t() @ x.detach().float())


def test_on_cuda_it_is_one_product_into_float32():
    """Shapes and types only: tensors that hold nothing, and on which no autograd engine can run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moeport.backends.torch.wide import WideLinear, has_wide_products

    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(6, 8, dtype=torch.bfloat16, device="cuda"), torch.empty(4, 8, device="cuda")
        assert has_wide_products(x)
        assert not has_wide_products(weight)
        out = WideLinear.apply(x, weight)
        assert (out.dtype, tuple(out.shape)) == (torch.float32, (6, 4))
        saved = SimpleNamespace(saved_tensors=(x, weight), needs_input_grad=(True, True))
        by_x, by_weight = WideLinear.backward(saved, out)
        assert (by_x.dtype, by_weight.dtype) == (torch.bfloat16, torch.float32)
        assert (by_x.shape, by_weight.shape) == (x.shape, weight.shape)
