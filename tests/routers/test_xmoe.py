import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance.formulas import softmax
from moeport.core.parameters import ParameterSpec, initial_parameters
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.xmoe import XMoEConfig
from tests.conformance.targets import GRADIENT_TOLERANCE, every_accurate_training_target
from tests.routers.examples import EXPERTS, WIDTH, choices, hidden_states, route, router_params
from tests.support import assert_close, assert_gradient, finite_difference, grid

VARIANTS = [XMoEConfig(routing_dim=3), XMoEConfig(top_k=3, routing_dim=4, initial_temperature=0.1)]
"""Further configs for the tests of all routers."""
CONFIG = XMoEConfig(top_k=2, routing_dim=4, initial_temperature=0.25)
PARAMS = router_params(build_router(CONFIG, WIDTH, EXPERTS))


def test_logits_are_cosines_over_the_temperature():
    routing = route(CONFIG, PARAMS)
    temperature = 0.25 * np.exp(PARAMS["log_temperature"][0])
    for x, logits, probs in zip(hidden_states(), routing.logits_TE, routing.probs_TE, strict=True):
        low = PARAMS["projection"] @ x
        cosines = [w @ low / (np.linalg.norm(w) * np.linalg.norm(low)) for w in PARAMS["weight"]]
        assert_close(logits, np.array(cosines) / temperature, 1e-11)
        assert_close(probs, softmax(logits), 1e-13)


def test_gates_are_the_probabilities_of_the_best_experts():
    routing = route(CONFIG, PARAMS)
    experts, gates = choices(routing)
    assert experts.tolist() == np.argsort(-routing.logits_TE, axis=1, kind="stable")[:, :2].tolist()
    assert_close(gates, np.take_along_axis(routing.probs_TE, experts, axis=1), 1e-15)


@pytest.mark.parametrize("factor", [0.01, 3.0, 1000.0])
@pytest.mark.parametrize("what", ["x", "weight", "projection"])
def test_lengths_do_not_matter(factor, what):
    want = route(CONFIG, PARAMS)
    params = {name: value * (factor if name == what else 1.0) for name, value in PARAMS.items()}
    got = route(CONFIG, params, hidden_states() * (factor if what == "x" else 1.0))
    assert_close(got.logits_TE, want.logits_TE, 1e-7)
    assert got.expert_N.tolist() == want.expert_N.tolist()


def test_a_token_of_zeros_is_routed_evenly():
    routing = route(CONFIG, PARAMS, np.zeros((2, WIDTH)))
    assert routing.probs_TE.tolist() == [[1 / EXPERTS] * EXPERTS] * 2


def test_training_starts_at_the_initial_temperature():
    router = build_router(CONFIG, WIDTH, EXPERTS)
    params = initial_parameters(router.parameter_specs(), seed=0)
    logits = router.logits(NumpyOps(), {**PARAMS, "log_temperature": params["log_temperature"]}, hidden_states())
    assert_close(logits / route(CONFIG, PARAMS).logits_TE, np.exp(PARAMS["log_temperature"][0]), 1e-6)


@pytest.mark.parametrize("name", ["projection", "log_temperature"])
@every_accurate_training_target
def test_gradients_of_projection_and_temperature(target, name):
    backend = target.build()
    ops, router = backend.ops, build_router(CONFIG, WIDTH, EXPERTS)
    params = {key: ops.cast(ops.from_numpy(value), target.dtype) for key, value in PARAMS.items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), target.dtype)
    weight_N = grid(40, *route(CONFIG, PARAMS).weight_N.shape)
    on_device = ops.cast(ops.from_numpy(weight_N), target.dtype)

    def total(inputs):
        return ops.sum(router.route(ops, params | inputs, x_TD, RouterContext(0, True)).weight_N * on_device)

    _, grads = backend.value_and_grad(total)({name: params[name]})
    want = finite_difference(
        lambda value: np.sum(route(CONFIG, PARAMS | {name: value}).weight_N * weight_N), PARAMS[name]
    )
    assert np.abs(want.value).max() > 1e-2
    assert_gradient(ops.to_numpy(grads[name]), want, GRADIENT_TOLERANCE[target.dtype])


def test_parameters_of_its_own():
    router = build_router(XMoEConfig(), d_model=32, num_experts=4, init_std=0.5)
    assert router.parameter_specs() == [
        ParameterSpec("weight", (4, 16), std=0.5),
        ParameterSpec("projection", (16, 32), std=0.5),
        ParameterSpec("log_temperature", (1,), "zeros"),
    ]


def test_more_choices_than_experts_are_a_problem():
    assert XMoEConfig(top_k=4).problems(4) == []
    assert XMoEConfig(top_k=5).problems(4) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (4)")
    ]
