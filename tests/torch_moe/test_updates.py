"""`update_router_state` follows all training calls since the last update, each once."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.torch_moe.layers import STATEFUL, inputs, make

stateful = pytest.mark.parametrize("name", STATEFUL)


def states(layer):
    return {key: buffer.clone() for key, buffer in layer.named_buffers()}


def updated(name, use, **options):
    """The state after `use(layer)` and an update, of a layer that is always the same."""
    layer = make(**STATEFUL[name], **options, seed=0)
    use(layer)
    layer.update_router_state()
    return states(layer)


def assert_same(found, expected):
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=0)


def whole(layer):
    layer(*inputs(layer, 4, 32))


@stateful
def test_several_calls_are_one_call_with_all_their_tokens(name):
    def in_parts(layer):
        (x,) = inputs(layer, 4, 32)
        for part in x.split(1):
            layer(part)

    def in_uneven_parts(layer):
        (x,) = inputs(layer, 4, 32)
        for part in x.flatten(0, 1).split([100, 0, 3, 25]):
            layer(part)

    expected = updated(name, whole)
    assert any(value.any() for value in expected.values())
    if name == "bias":  # a capacity is for a micro-batch, so it depends on their size
        assert_same(updated(name, in_parts), expected)
        assert_same(updated(name, in_uneven_parts), expected)
    else:
        steps, *_ = updated(name, in_parts)["capacity_averages"].tolist()
        assert steps == 1


@stateful
def test_evaluation_and_passes_without_gradients_do_not_count(name):
    def with_others(layer):
        whole(layer)
        layer.eval()(*inputs(layer, 2, 9, seed=1))
        with torch.inference_mode():
            layer.train()(*inputs(layer, 2, 9, seed=2))
        with torch.no_grad():
            layer(*inputs(layer, 2, 9, seed=3))

    assert_same(updated(name, with_others), updated(name, whole))


@stateful
def test_without_training_calls_nothing_changes(name):
    layer = make(**STATEFUL[name])
    whole(layer)
    layer.update_router_state()
    before = states(layer)
    layer.update_router_state()
    layer.eval()(*inputs(layer, 2, 9))
    layer.update_router_state()
    assert_same(states(layer), before)


@pytest.mark.parametrize("wrap", ["non-reentrant", "reentrant", "nested", "twice"])
@stateful
def test_a_recomputed_call_counts_once(name, wrap):
    def recomputed(layer):
        (x,) = inputs(layer, 4, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if wrap == "nested":
                y = checkpoint(lambda v: checkpoint(layer, v, use_reentrant=False) * 2, x, use_reentrant=False)
            else:
                y = checkpoint(layer, x, use_reentrant=wrap == "reentrant")
            if wrap == "twice":
                y = y + checkpoint(layer, x, use_reentrant=False)
            y.sum().backward()

    def twice(layer):
        whole(layer)
        whole(layer)

    assert_same(updated(name, recomputed), updated(name, twice if wrap == "twice" else whole))


@stateful
def test_metrics_that_are_set_are_followed_until_the_next_call(name):
    layer = make(**STATEFUL[name])
    whole(layer)
    layer.metrics = layer.metrics._replace(chosen_E=torch.tensor([9, 1, 1, 1, 1, 1, 1, 1]))
    for _ in range(3):
        layer.update_router_state()
    if name != "capacity":
        assert layer.router.bias.tolist() == pytest.approx([-0.003, *[0.003] * 7])
    if name != "bias":
        assert layer.capacity_averages[0] == 3
    whole(layer)
    assert layer.metrics.chosen_E.sum() == 4 * 32 * 2


def test_a_layer_without_state_keeps_nothing():
    layer = make("topk")
    whole(layer)
    assert layer._sums is None
    layer.update_router_state()


def test_a_loss_without_gradient_in_training_is_warned_of_once():
    layer = make("topk", router_z_loss=1e-3)
    (x,) = inputs(layer, 2, 8)
    checkpoint(layer, x, use_reentrant=True)
    with pytest.warns(UserWarning, match=r"auxiliary loss .* without a gradient .* pass use_reentrant=False"):
        assert layer.auxiliary_loss is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.auxiliary_loss is not None
        plain, silent = make("topk"), make("topk", load_balance={"coefficient": 0})
        plain(x)
        assert plain.auxiliary_loss.requires_grad
        checkpoint(plain, x, use_reentrant=False)
        assert plain.auxiliary_loss.requires_grad
        with torch.no_grad():
            plain.eval()(x)
            silent(x)
        assert not plain.auxiliary_loss.requires_grad
        assert silent.auxiliary_loss == 0
