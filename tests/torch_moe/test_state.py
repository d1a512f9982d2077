"""State that grows in small steps keeps its type, whatever the module is cast to, and survives copies."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.torch_moe.layers import STATEFUL, inputs, make

NARROW = (torch.bfloat16, torch.float16)


def with_state(name):
    """A layer whose state no narrow type can hold."""
    layer = make(**STATEFUL[name])
    for buffer in layer.buffers():
        buffer.copy_(4097.0 + torch.arange(buffer.numel()) * 1.001)
    return layer


def cast_module(layer, dtype):
    layer.to(dtype)


def cast_model(layer, dtype):
    nn.Sequential(nn.Linear(2, 2), layer).to(dtype)


def cast_by_method(layer, dtype):
    {torch.bfloat16: layer.bfloat16, torch.float16: layer.half}[dtype]()


def cast_by_type(layer, dtype):
    layer.type(dtype)


def cast_each_part(layer, dtype):
    for module in layer.modules():
        module.to(dtype)


def cast_and_back(layer, dtype):
    layer.double().to(dtype).float().to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("cast", [cast_module, cast_model, cast_by_method, cast_by_type, cast_each_part, cast_and_back])
def test_a_cast_leaves_state_as_it_is(name, cast, dtype):
    layer = with_state(name)
    before = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    cast(layer, dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    for key, buffer in layer.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[key])


@pytest.mark.parametrize("name", STATEFUL)
def test_the_type_given_to_the_layer_is_that_of_its_parameters(name):
    for dtype in NARROW:
        layer = make(**STATEFUL[name], dtype=dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert {b.dtype for b in layer.buffers()} == {torch.float32}
    assert {b.dtype for b in make(**STATEFUL[name], dtype=torch.float64).buffers()} == {torch.float64}
    layer = with_state(name).double()
    assert {b.dtype for b in layer.buffers()} == {torch.float64}
    assert {b.dtype for b in layer.bfloat16().buffers()} == {torch.float32}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_cast_behind_the_modules_back_is_float32_again(name):
    """FSDP1 and DDP with a buffer type write to `.data`; a checkpoint in a narrow type may replace the buffers."""
    layer = make(**STATEFUL[name])
    for buffer in layer.buffers():
        buffer.data = buffer.data.bfloat16()
    layer(*inputs(layer, 2, 8))
    assert {b.dtype for b in layer.buffers()} == {torch.float32}
    for assign in (False, True):
        layer.load_state_dict({key: x.bfloat16() for key, x in layer.state_dict().items()}, assign=assign)
        assert {b.dtype for b in layer.buffers()} == {torch.float32}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_and_the_calls_it_will_follow_survive_copies(name):
    layer = with_state(name).bfloat16()
    layer(*inputs(layer, 2, 32, dtype=torch.bfloat16))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), torch.load(stream, weights_only=False)]
    other = make(**STATEFUL[name], dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    for key, buffer in layer.named_buffers():
        assert torch.equal(other.get_buffer(key), buffer)
    layer.update_router_state()
    for made in copies:
        made.update_router_state()
        for key, buffer in layer.named_buffers():
            assert torch.equal(made.get_buffer(key), buffer)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_small_steps_add_up_in_every_type(dtype):
    layer = make("sigmoid_bias", router_options={"top_k": 1, "bias_update_rate": 1e-3}, dtype=dtype)
    x = torch.ones(4, 16, dtype=dtype)
    for _ in range(600):
        layer.metrics = _load(layer, x)
        layer.update_router_state()
    assert layer.router.bias.tolist() == pytest.approx([-0.6, *[0.6] * 7], rel=1e-4)


def _load(layer, x):
    layer(x)
    return layer.metrics._replace(chosen_E=torch.tensor([9, 1, 1, 1, 1, 1, 1, 1]))
