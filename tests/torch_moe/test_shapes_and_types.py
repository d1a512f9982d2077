"""Every router and policy on every shape, also without tokens, and in every type."""

import pytest
import torch

from moeport.errors import UserError
from moeport.routers import ROUTERS
from tests.torch_moe.layers import D, backward, inputs, make, variants

VARIANTS = [pytest.param(router, options, id=name) for name, router, options in variants()]
EMPTY = [(0,), (0, 4), (2, 0), (0, 0), (2, 0, 3), (2, 3, 0)]
SHAPES = [(), (1,), (5,), (1, 1), (2, 3), (2, 1, 4)]


@pytest.mark.parametrize(("router", "options"), VARIANTS)
def test_without_tokens_there_are_no_rows_and_gradients_are_zeros(router, options):
    layer = make(router, **options)
    for shape in EMPTY:
        for training in (True, False):
            layer.train(training).zero_grad()
            x, *ids = inputs(layer, *shape)
            y = layer(x, *ids)
            assert y.shape == x.shape
            assert y.dtype == x.dtype
            assert layer.auxiliary_loss == 0
            backward(layer, y)
            assert x.grad.shape == x.shape
            for parameter in layer.parameters():
                assert parameter.grad.shape == parameter.shape
                assert not parameter.grad.any()
            assert layer.metrics.chosen_E.tolist() == layer.metrics.served_E.tolist() == [0] * 8
        layer.train().update_router_state()
        assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


def test_the_loss_alone_gives_gradients_without_tokens():
    layer = make("switch")
    layer(*inputs(layer, 0))
    layer.auxiliary_loss.backward()
    assert not layer.router.weight.grad.any()


@pytest.mark.parametrize(("router", "options"), VARIANTS)
def test_every_type_forward_and_backward(router, options):
    layer = make(router, **options)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer.to(dtype)
        for shape in SHAPES if dtype is torch.float16 else SHAPES[-1:]:
            layer.zero_grad()
            x, *ids = inputs(layer, *shape, dtype=dtype)
            y = layer(x, *ids)
            assert y.shape == x.shape
            assert y.dtype == dtype
            assert layer.auxiliary_loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
            backward(layer, y)
            for array in (x, *layer.parameters()):
                assert array.grad.dtype == dtype
                assert torch.isfinite(array.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_autocast(router, dtype):
    layer = make(router)
    x, *ids = inputs(layer, 2, 8)
    with torch.autocast("cpu", dtype):
        y = layer(x, *ids)
        assert y.dtype == dtype
        assert layer(x.double(), *ids).dtype == torch.float64
    backward(layer, y)
    assert {array.grad.dtype for array in (x, *layer.parameters()) if array.grad is not None} == {torch.float32}


def test_other_views_of_the_same_numbers():
    layer = make()
    (x,) = inputs(layer, 2, 3, 4)
    expected = layer(x)
    torch.testing.assert_close(layer(x.transpose(0, 2).contiguous().transpose(0, 2)), expected)
    torch.testing.assert_close(layer(x.repeat(1, 1, 1, 2)[..., :D]), expected)
    torch.testing.assert_close(layer(x.flatten(0, 2)).view_as(expected), expected)
    layer(x[:1, :1].expand(2, 3, 4, D)).sum().backward()


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(2, 15), r"torch.float32 of the shape \(2, 15\)"),
        (torch.zeros(2, 16, dtype=torch.long), r"torch.int64 of the shape \(2, 16\)"),
        (torch.tensor(1.0), r"torch.float32 of the shape \(\)"),
    ],
)
def test_input_of_another_width_or_kind_is_refused(x, got):
    with pytest.raises(UserError, match=rf"x is {got}; expected a floating-point type and a last dimension of d_model"):
        make()(x)
