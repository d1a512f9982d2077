import dataclasses
import functools

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.parameters import ParameterSpec
from moeport.routers import BY_NAME, build_router
from moeport.routers.base import RouterConfig
from moeport.routers.forced import ForcedBalanceConfig
from moeport.routers.grap import GrAPConfig
from tests.conformance.targets import GRADIENT_TOLERANCE, TOLERANCE, every_accurate_training_target, every_target
from tests.routers.catalogue import CONFIGS, EXAMPLES, EXPERTS_CHOOSE
from tests.routers.examples import (
    EXPERTS,
    TOKEN_COUNTS,
    TOKENS,
    WIDTH,
    build,
    choices,
    hidden_states,
    label,
    placed_context,
    route,
    router_params,
    trained_weight,
)
from tests.support import assert_close, assert_gradient, finite_difference, grid, sampled

every_config = pytest.mark.parametrize("config", CONFIGS, ids=label)
BY_SCORES = [config for config in CONFIGS if not (config.needs_token_ids or isinstance(config, ForcedBalanceConfig))]
"""Those that choose by scores alone, not by ids or positions."""
every_scoring_config = pytest.mark.parametrize("config", BY_SCORES, ids=label)
every_choosing_config = pytest.mark.parametrize("config", CONFIGS + EXPERTS_CHOOSE, ids=label)
ARRAYS = ("weight_N", "logits_TE", "probs_TE")


@pytest.mark.parametrize("name", BY_NAME)
def test_every_router_has_examples(name):
    """The first is that of its file in configs/, which the tests run with EXPERTS experts."""
    assert EXAMPLES[name], f"no file in configs/ has router {name}; expected configs/routers/{name}.yaml"
    assert {type(config) for config in EXAMPLES[name]} == {BY_NAME[name].config_class}
    assert [config.problems(EXPERTS) for config in EXAMPLES[name]] == [[]] * len(EXAMPLES[name])


def placed(backend, config):
    """(router, params, x, context) on a backend: hidden states in the compute type."""
    ops, router = backend.ops, build(config)
    params = {k: ops.cast(ops.from_numpy(v), backend.parameter_dtype) for k, v in router_params(router).items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), backend.dtype)
    return router, params, x_TD, placed_context(ops, router)


@every_choosing_config
@every_target
def test_decisions_and_gates_are_those_of_the_reference(target, config):
    """Where the compute type has rounded the hidden states, the reference sees the rounded ones."""
    backend = target.build()
    ops = backend.ops
    router, params, x_TD, its_context = placed(backend, config)
    got = router.route(ops, params, x_TD, its_context)
    want = route(config, x_TD=ops.to_numpy(x_TD).astype(np.float64))
    assert ops.to_numpy(got.expert_N).tolist() == want.expert_N.tolist()
    assert (got.token_N is None) == (want.token_N is None)
    if want.token_N is not None:
        assert ops.to_numpy(got.token_N).tolist() == want.token_N.tolist()
    accurate = "float64" if target.dtype == "float64" else "float32"
    assert (got.own_loss is None, got.affinity_N is None) == (want.own_loss is None, want.affinity_N is None)
    for name in [name for name in (*ARRAYS, "own_loss", "affinity_N") if getattr(want, name) is not None]:
        assert ops.dtype(getattr(got, name)) == accurate
        if name == "own_loss" and isinstance(config, GrAPConfig):
            # A divergence of near-equal distributions is a small difference of sums of order 1, and rounds as they do.
            allowed = TOLERANCE[accurate] * max(config.locality_coefficient, abs(want.own_loss))
            np.testing.assert_allclose(ops.to_numpy(got.own_loss), want.own_loss, rtol=0, atol=allowed)
        else:
            assert_close(ops.to_numpy(getattr(got, name)), getattr(want, name), TOLERANCE[accurate], name)
    for name in ("num_tokens", "num_experts", "balanced_choices", "choices_per_token", "null_experts"):
        assert getattr(got, name) == getattr(want, name)


def scalar(ops, routing, weights):
    """A sum over everything differentiable in a routing."""
    terms = [ops.sum(getattr(routing, name) * v) for name, v in zip(ARRAYS, weights, strict=True)]
    total = terms[0] + terms[1] + terms[2]
    return total if routing.own_loss is None else total + routing.own_loss


def cotangents(config):
    """Arrays of numpy that weigh what is differentiable in a routing."""
    reference = route(config)
    return [grid(30 + i, *getattr(reference, name).shape) for i, name in enumerate(ARRAYS)]


@functools.cache
def finite_differences(config):
    """Gradients of `scalar` by some of the hidden states and of the trained weight, from numpy in float64."""
    params, weights = router_params(build(config)), cotangents(config)
    at = {"x": hidden_states()} | {name: params[name] for name in trained_weight(build(config))}

    def total(name, values):
        moved = at[name].copy()
        moved[sampled(moved.shape)] = values
        inputs = {"x_TD": moved} if name == "x" else {"params": params | {name: moved}}
        return scalar(NumpyOps(), route(config, **inputs), weights)

    return {
        name: finite_difference(functools.partial(total, name), value[sampled(value.shape)])
        for name, value in at.items()
    }


@every_choosing_config
@every_accurate_training_target
def test_gradients_are_those_of_finite_differences(target, config):
    backend = target.build()
    ops = backend.ops
    router, params, x_TD, its_context = placed(backend, config)
    names = ["x", *trained_weight(router)]
    on_device = [ops.cast(ops.from_numpy(v), backend.dtype) for v in cotangents(config)]

    def total(inputs):
        routing = router.route(ops, params | inputs, inputs["x"], its_context)
        return scalar(ops, routing, on_device)

    _, grads = backend.value_and_grad(total)({name: (params | {"x": x_TD})[name] for name in names})

    for name, want in finite_differences(config).items():
        gradient = ops.to_numpy(grads[name])
        assert_gradient(gradient[sampled(gradient.shape)], want, GRADIENT_TOLERANCE[target.dtype], name)


@every_config
def test_each_token_goes_to_as_many_different_experts_as_the_config_says(config):
    routing = route(config, training=False)
    assert routing.choices_per_token == config.experts_per_token
    served = [[expert for expert in experts if expert != EXPERTS] for experts in choices(routing)[0].tolist()]
    for experts in served:
        assert len(set(experts)) == len(experts) <= config.experts_per_token
        assert set(experts) <= set(range(EXPERTS))
    numbers = {len(experts) for experts in served}
    assert len(numbers) > 1 if config.may_use_fewer else numbers == {config.experts_per_token}


@every_config
def test_what_goes_nowhere_has_no_weight(config):
    experts, gates = choices(route(config, training=False))
    assert (gates[experts == EXPERTS] == 0).all()
    assert (gates[experts < EXPERTS] > 0).all()


@every_scoring_config
def test_equal_scores_go_to_the_lower_index(config):
    router = build(config)
    params = {name: np.zeros_like(value) for name, value in router_params(router).items()}
    zeros = np.zeros((TOKENS, WIDTH))
    for experts in choices(route(config, params, zeros, training=False))[0].tolist():
        served = [expert for expert in experts if expert != EXPERTS]
        assert served == list(range(len(served) if config.may_use_fewer else config.experts_per_token))
        assert served


@every_scoring_config
def test_tokens_are_routed_one_by_one(config):
    """The routing of a token does not depend on the others in the batch."""
    whole = route(config, training=False)
    shape = (whole.num_tokens, -1)
    alone = [route(config, x_TD=hidden_states()[i : i + 1], training=False) for i in range(whole.num_tokens)]
    assert whole.expert_N.reshape(shape).tolist() == [routing.expert_N.tolist() for routing in alone]
    assert_close(whole.weight_N.reshape(shape), [routing.weight_N for routing in alone], 1e-14)


@every_choosing_config
def test_probabilities_sum_to_one(config):
    probs_TE = route(config).probs_TE
    assert (probs_TE >= 0).all() if config.needs_token_ids else (probs_TE > 0).all()
    assert_close(probs_TE.sum(axis=1), np.ones(len(probs_TE)), 1e-14)


@every_choosing_config
def test_parameters(config):
    router = build_router(config, WIDTH, EXPERTS, init_std=0.5, vocab_size=len(TOKEN_COUNTS))
    trained = [spec for spec in router.parameter_specs() if spec.trainable]
    if type(config).parameter_count is RouterConfig.parameter_count:
        assert trained == [ParameterSpec("weight", (EXPERTS, WIDTH), std=0.5)]
    assert config.parameter_count(WIDTH, EXPERTS) == sum(spec.size for spec in trained)
    assert router.paper.count("arXiv") >= 1 or router.paper.startswith("For benchmarks, ")


@every_choosing_config
def test_a_routing_is_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        route(config).num_tokens = 1
