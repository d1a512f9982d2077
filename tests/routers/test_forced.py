"""The routers for benchmarks: their load is what they promise, whatever the scores."""

from dataclasses import replace

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance import formulas
from moeport.core.parameters import initial_parameters
from moeport.core.routing import RouterContext
from moeport.routers.forced import ForcedBalanceConfig, ForcedBiasConfig
from tests.model.models import model_and_params, model_config
from tests.routers.examples import EXPERTS, TOKENS, build, choices, hidden_states, route, router_params
from tests.support import assert_close

VARIANTS = [ForcedBalanceConfig(top_k=3)]
"""Further configs for the tests of all routers."""


def in_turn(length, top_k, experts=EXPERTS):
    """Round robin over the choices of a text, as torchtitan numbers them."""
    return np.arange(length * top_k).reshape(length, top_k) % experts


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_experts_take_turns_in_every_text(top_k):
    router, length = build(ForcedBalanceConfig(top_k=top_k)), 8
    x_TD = hidden_states(tokens=3 * length)
    routing = router.route(NumpyOps(), router_params(router), x_TD, RouterContext(0, True, num_sequences=3))
    experts, gates = choices(routing)
    assert experts.tolist() == np.tile(in_turn(length, top_k), (3, 1)).tolist()
    assert np.bincount(experts.reshape(-1), minlength=EXPERTS).tolist() == [3 * top_k] * EXPERTS
    probs = np.array([formulas.softmax(z) for z in x_TD @ router_params(router)["weight"].T])
    chosen = np.take_along_axis(probs, experts, axis=1)
    assert_close(gates, chosen if top_k == 1 else chosen / chosen.sum(axis=1, keepdims=True), 1e-14)


@pytest.mark.parametrize(("length", "top_k"), [(5, 2), (7, 3), (1, 1), (12, 1)])
def test_loads_differ_by_one_row_per_text_at_most(length, top_k):
    router = build(ForcedBalanceConfig(top_k=top_k))
    context = RouterContext(0, True, num_sequences=4)
    routing = router.route(NumpyOps(), router_params(router), hidden_states(tokens=4 * length), context)
    assert np.ptp(np.bincount(routing.expert_N, minlength=EXPERTS)) <= 4


def test_a_text_that_continues_goes_on_in_turn():
    router = build(ForcedBalanceConfig(top_k=3))
    params, x_TD, whole = router_params(router), hidden_states(), in_turn(TOKENS, 3)
    context = replace(RouterContext(0, False), position_T=np.array([7, 2]))
    assert choices(router.route(NumpyOps(), params, x_TD[[7, 2]], context))[0].tolist() == whole[[7, 2]].tolist()


def test_the_bias_is_part_of_the_scores():
    config = ForcedBiasConfig(top_k=2)
    params = router_params(build(config))
    z_TE = hidden_states() @ params["weight"].T + params["bias"]
    routing = route(config)
    experts, gates = choices(routing)
    assert experts.tolist() == np.argsort(-z_TE, axis=1)[:, :2].tolist()
    chosen = np.take_along_axis(np.exp(z_TE), experts, axis=1)
    assert_close(gates, chosen / chosen.sum(axis=1, keepdims=True), 1e-14)
    assert_close(routing.logits_TE, z_TE, 1e-14)


def test_a_larger_bias_makes_the_load_less_even():
    x_TD, loads = hidden_states(tokens=400), []
    for std in (0.0, 1.0, 4.0):
        router = build(ForcedBiasConfig(bias_std=std))
        params = {k: v.astype(float) for k, v in initial_parameters(router.parameter_specs(), 3).items()}
        routing = router.route(NumpyOps(), params, x_TD, RouterContext(0, True))
        loads.append(np.bincount(routing.expert_N, minlength=EXPERTS).max() / (400 * 2 / EXPERTS))
    assert loads == sorted(loads)
    assert loads[0] < 1.5 < 3 < loads[2]


def test_every_layer_has_a_bias_of_its_own_that_training_leaves_alone():
    model, params = model_and_params(model_config("forced_bias"))
    names = [name for name in params if name.endswith("router.bias")]
    first, second = (params[name] for name in names)
    assert (first != second).all()
    assert len(names) == 2
    assert model.router_state_names() == []  # so that no step waits for the host to update it
