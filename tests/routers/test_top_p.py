import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import LoadBalanceConfig, MoEConfig
from moeport.conformance.formulas import softmax
from moeport.core.routing import RouterContext
from moeport.model.moe import MoELayer
from moeport.routers import build_router
from moeport.routers.top_p import TopPConfig
from tests.conformance.targets import GRADIENT_TOLERANCE, every_accurate_training_target
from tests.routers.examples import (
    EXPERTS,
    WIDTH,
    choices,
    hidden_states,
    logits_as_tokens,
    route,
    router_params,
)
from tests.support import assert_close, assert_gradient, finite_difference, grid, rng

VARIANTS = [
    TopPConfig(top_k=EXPERTS, threshold=0.8),
    TopPConfig(threshold=0.6, entropy_coefficient=0.0),
]
"""Further configs for the tests of all routers."""
PROBS = np.array([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25], [0.0625, 0.0625, 0.0625, 0.8125]])


def by_row(logits_TE):
    return np.array([softmax(row) for row in logits_TE])


def routed(probs_TE, **options):
    return choices(route(TopPConfig(**options), *logits_as_tokens(np.log(probs_TE)), num_experts=probs_TE.shape[1]))


@pytest.mark.parametrize(
    ("threshold", "experts"),
    [
        (0.2, [[1, 4, 4, 4], [0, 4, 4, 4], [3, 4, 4, 4]]),
        (0.45, [[1, 4, 4, 4], [0, 1, 4, 4], [3, 4, 4, 4]]),
        (0.7, [[1, 2, 4, 4], [0, 1, 2, 4], [3, 4, 4, 4]]),
        (0.84, [[1, 2, 0, 4], [0, 1, 2, 3], [3, 0, 4, 4]]),
        (1.0, [[1, 2, 0, 3], [0, 1, 2, 3], [3, 0, 1, 2]]),
    ],
)
def test_experts_up_to_the_one_that_reaches_the_threshold(threshold, experts):
    got, gates = routed(PROBS, threshold=threshold)
    assert got.tolist() == experts
    want = [[PROBS[token][e] if e < 4 else 0.0 for e in row] for token, row in enumerate(experts)]
    assert_close(gates, want, 1e-15)


@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.6, 0.9])
def test_the_chosen_probabilities_reach_the_threshold_and_are_as_few_as_can_be(threshold):
    logits = rng(3).standard_normal((500, 8))
    experts, gates = routed(by_row(logits), top_k=8, threshold=threshold)
    for chosen, weights, probs in zip(experts, gates, by_row(logits), strict=True):
        number = int((chosen < 8).sum())
        best = np.sort(probs)[::-1]
        assert best[:number].sum() >= threshold > best[: number - 1].sum()
        assert_close(weights[:number], best[:number], 1e-14)
    assert len({int((chosen < 8).sum()) for chosen in experts}) > 1


def test_top_k_bounds_the_experts_of_flat_probabilities():
    experts, gates = routed(np.full((1, 8), 0.125), top_k=3, threshold=0.9)
    assert experts.tolist() == [[0, 1, 2]]
    assert gates.tolist() == [[0.125] * 3]


def test_the_own_loss_is_the_weighted_mean_entropy():
    logits = rng(4).standard_normal((50, 8))
    routing = route(TopPConfig(entropy_coefficient=0.25), *logits_as_tokens(logits))
    probs = by_row(logits)
    assert_close(routing.own_loss, 0.25 * -np.mean(np.sum(probs * np.log(probs), axis=1)), 1e-13)
    assert route(TopPConfig(entropy_coefficient=0.0), *logits_as_tokens(logits)).own_loss is None


@every_accurate_training_target
def test_the_gradient_of_the_own_loss_reaches_the_router(target):
    config, backend = TopPConfig(entropy_coefficient=1.0), target.build()
    ops, router = backend.ops, build_router(config, WIDTH, EXPERTS)
    x_TD = ops.cast(ops.from_numpy(hidden_states()), target.dtype)
    weight = ops.cast(ops.from_numpy(router_params(router)["weight"]), target.dtype)

    def total(inputs):
        return router.route(ops, inputs, x_TD, RouterContext(0, True)).own_loss

    _, grads = backend.value_and_grad(total)({"weight": weight})
    want = finite_difference(lambda w: route(config, {"weight": w}).own_loss, router_params(router)["weight"])
    assert np.abs(want.value).max() > 1e-2
    assert_gradient(ops.to_numpy(grads["weight"]), want, GRADIENT_TOLERANCE[target.dtype])


def test_the_layer_adds_the_own_loss_to_its_auxiliary_losses():
    config = MoEConfig(
        num_experts=EXPERTS,
        expert_hidden=5,
        router=TopPConfig(entropy_coefficient=0.5),
        load_balance=LoadBalanceConfig(coefficient=0.25),
    )
    layer = MoELayer(config, WIDTH, init_std=0.02, out_std=0.01)
    params = {spec.name: grid(i, *spec.shape) for i, spec in enumerate(layer.parameter_specs())}
    _, metrics = layer.forward(NumpyOps(), params, hidden_states(), RouterContext(0, True))
    own = route(config.router, {"weight": params["router.weight"]}).own_loss
    assert own > 0
    assert metrics.own_loss == own
    assert_close(layer.auxiliary_loss(NumpyOps(), metrics), metrics.load_balance * 0.25 + own, 1e-15)


def test_more_choices_than_experts_are_a_problem():
    assert TopPConfig(top_k=4).problems(4) == []
    assert TopPConfig().problems(3) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (3)")
    ]
