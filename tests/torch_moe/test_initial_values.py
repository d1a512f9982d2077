"""Initial values come from torch's generator, like those of any module, unless a seed is given."""

import copy

import pytest
import torch
from torch import nn

from moeport.core.parameters import initial_parameters
from moeport.routers import ROUTERS
from tests.torch_moe.layers import EXTRAS, inputs, make

every_router = pytest.mark.parametrize("router", ROUTERS)


def equal(a, b):
    return {name for name, x in a.state_dict().items() if torch.equal(x, b.state_dict()[name])}


def drawn(layer):
    """Names of what is drawn at random, and not 0 or 1 at first."""
    return {name for name, x in layer.state_dict().items() if x.unique().numel() > 2 or "visible" in name}


@every_router
def test_each_layer_has_its_own_and_the_generator_repeats_them(router):
    torch.manual_seed(5)
    first, second = make(router, **EXTRAS), make(router, **EXTRAS)
    assert not equal(first, second) & drawn(first)
    torch.manual_seed(5)
    assert equal(make(router, **EXTRAS), first) == first.state_dict().keys()


@every_router
def test_a_seed_gives_the_values_of_a_run_with_that_seed(router):
    layer, same, other = (make(router, **EXTRAS, seed=seed) for seed in (3, 3, 4))
    expected = initial_parameters(layer.layer.parameter_specs(), 3)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, torch.tensor(expected[name]))
    assert equal(layer, same) == layer.state_dict().keys()
    assert not equal(layer, other) & drawn(layer)


@every_router
def test_reset_parameters_completes_a_layer_made_on_the_meta_device(router):
    with torch.device("meta"):
        layer = make(router, **EXTRAS, capacity=None)
    assert {x.device.type for x in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu")
    for x in layer.state_dict().values():
        x.fill_(float("nan"))
    torch.manual_seed(2)
    layer.reset_parameters()
    torch.manual_seed(2)
    assert equal(make(router, **EXTRAS), layer) == layer.state_dict().keys()
    layer(*inputs(layer, 2, 3))


def test_every_module_with_parameters_resets_its_own():
    """FSDP1 and others walk over the modules of a model on the meta device."""
    layer = make("sigmoid_bias", **EXTRAS, capacity="locmoe", device="meta")
    for module in layer.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    assert layer.router.bias.tolist() == [0] * 8
    assert layer.capacity_averages.tolist() == [0] * 3
    assert 0.2 < layer.experts.w_in.std() < 0.4


def test_reset_draws_anew_or_the_same_with_a_seed():
    free, seeded = make(), make(seed=1)
    before = copy.deepcopy((free, seeded))
    free.reset_parameters()
    seeded.reset_parameters()
    assert not equal(free, before[0])
    assert equal(seeded, before[1]) == seeded.state_dict().keys()


def test_defaults_of_type_and_device_are_those_of_torch():
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer, linear = make("sigmoid_bias"), nn.Linear(2, 2)
    finally:
        torch.set_default_dtype(old)
    assert layer.experts.w_in.dtype == linear.weight.dtype == torch.bfloat16
    assert layer.router.bias.dtype == torch.float32
    assert make(device="meta").experts.w_in.is_meta
    with torch.device("meta"):
        assert make().router.weight.is_meta
        assert not make(device="cpu").router.weight.is_meta
