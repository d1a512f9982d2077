"""What wraps modules reaches the parts of a layer, since the layer calls them as modules."""

import copy
import threading

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from moeport.errors import UserError
from moeport.routers import ROUTERS
from tests.torch_moe.layers import EXTRAS, STATEFUL, backward, inputs, make

PARTS = ("router", "experts", "shared", "mixing", "dense")


@pytest.mark.parametrize("router", ROUTERS)
def test_hooks_on_every_part_see_tensors_forward_and_backward(router):
    layer, seen = make(router, **EXTRAS), []
    for name, part in layer.named_children():
        part.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, "before")))
        part.register_forward_hook(lambda module, args, output, name=name: seen.append((name, args[0].shape)))
        part.register_full_backward_hook(lambda module, into, out, name=name: seen.append((name, "gradient")))
    assert {name for name, _ in layer.named_children()} == set(PARTS)
    x, *ids = inputs(layer, 2, 8)
    backward(layer, layer(x, *ids))
    for name in PARTS:
        assert (name, "before") in seen
        assert [shape[-1] for part, shape in seen if part == name and isinstance(shape, torch.Size)] == [16]
        if name != "router" or any(p.requires_grad for p in layer.router.parameters()):
            assert (name, "gradient") in seen


def test_a_hook_changes_what_the_layer_computes():
    layer = make(**EXTRAS)
    (x,) = inputs(layer, 2, 8)
    with torch.no_grad():
        expected = layer(x)
        for name in ("experts", "shared", "dense"):
            handle = layer.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
            assert not torch.allclose(layer(x), expected)
            handle.remove()
        torch.testing.assert_close(layer(x), expected)


class Adapter(nn.Module):
    """A low-rank adapter as libraries make them: it takes the place of a module, which it keeps and calls."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.up(self.down(x))


def test_adapters_in_place_of_parts():
    layer = make("sigmoid_bias", **EXTRAS)
    (x,) = inputs(layer, 2, 8)
    expected = layer(x)
    for name in ("experts", "shared", "dense"):
        setattr(layer, name, Adapter(layer.get_submodule(name)))
    torch.testing.assert_close(layer(x), expected)
    backward(layer, layer(x))
    assert layer.experts.up.weight.grad.any()
    assert layer.experts.base_layer.w_in.grad is None
    layer.update_router_state()
    assert layer.router.bias.any()
    layer.bfloat16()(x.bfloat16())
    assert layer.router.bias.dtype == torch.float32


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_parametrised_weights():
    layer = make(**EXTRAS)
    (x,) = inputs(layer, 2, 8)
    doubled = copy.deepcopy(layer)
    for part, name in (("experts", "w_in"), ("router", "weight"), ("shared", "w_out"), ("mixing", "weight")):
        parametrize.register_parametrization(layer.get_submodule(part), name, Scaled())
        with torch.no_grad():
            doubled.get_submodule(part).get_parameter(name).mul_(2)
    torch.testing.assert_close(layer(x), doubled(x))
    backward(layer, layer(x))
    assert layer.experts.parametrizations.w_in.original.grad.any()
    layer.update_router_state()


def test_norms_of_weights_and_pruning():
    layer = make(**EXTRAS)
    (x,) = inputs(layer, 2, 8)
    parametrizations.weight_norm(layer.shared, "w_in")
    parametrizations.spectral_norm(layer.router, "weight")
    nn.utils.prune.l1_unstructured(layer.dense, "w_out", 0.5)
    backward(layer, layer(x))
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_frozen_parts():
    for frozen in PARTS:
        layer = make(**EXTRAS)
        layer.get_submodule(frozen).requires_grad_(False)
        backward(layer, layer(*inputs(layer, 2, 8)))
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen)
    layer = make(**EXTRAS).requires_grad_(False)
    (x,) = inputs(layer, 2, 8)
    layer(x).sum().backward()
    assert x.grad.any()
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("router", ROUTERS)
def test_functional_call_and_gradients_of_functions(router):
    torch.manual_seed(1)
    layer = make(router)
    x, *ids = inputs(layer, 2, 5, requires_grad=False)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x, *ids)).square().sum()

    torch.manual_seed(0)
    found = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    torch.manual_seed(0)
    x.requires_grad_()
    layer(x, *ids).square().sum().backward()
    torch.testing.assert_close(found[1], x.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            found[0][name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )


def test_transforms_of_functions_are_training_calls():
    layer, same = make(**STATEFUL["both"], seed=0), make(**STATEFUL["both"], seed=0)
    (x,) = inputs(layer, 2, 32, requires_grad=False)
    torch.func.grad(lambda x: layer(x).sum())(x)
    same(x)
    for made in (layer, copy.deepcopy(layer), same):
        made.update_router_state()
        assert torch.equal(made.router.bias, same.router.bias) or made is not same
    assert torch.equal(layer.router.bias, same.router.bias)
    assert torch.equal(layer.capacity, same.capacity)


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_second_derivatives(activation):
    layer = make("topk", activation=activation, dtype=torch.float64, seed=0)
    (x,) = inputs(layer, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_calls_from_several_threads_compute_the_same():
    layer = make()
    (x,) = inputs(layer, 2, 8)
    expected, found = layer(x), []
    threads = [threading.Thread(target=lambda: found.extend(layer(x) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(y, expected) for y in found)


def test_data_parallel_evaluates_and_refuses_to_train():
    layer = make()
    (x,) = inputs(layer, 2, 8)
    replica = layer.eval()._replicate_for_data_parallel()
    torch.testing.assert_close(replica(x), layer(x))
    with pytest.raises(
        UserError, match=r"cannot train under nn\.DataParallel.*use nn\.parallel\.DistributedDataParallel"
    ):
        layer.train()._replicate_for_data_parallel()(x)
