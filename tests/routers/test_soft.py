import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.dispatch import soft_combine, soft_dispatch
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.soft import SoftConfig
from tests.conformance.targets import GRADIENT_TOLERANCE, TOLERANCE, every_accurate_training_target, every_target
from tests.routers.examples import EXPERTS, WIDTH, label, router_params, shipped
from tests.support import assert_close, assert_gradient, finite_difference, grid, rng

VARIANTS = [SoftConfig(), SoftConfig(slots_per_expert=3)]
"""Further configs for the tests of all routers."""
SEQUENCES, LENGTH = 3, 5
X = rng(1).standard_normal((SEQUENCES * LENGTH, WIDTH))
every_config = pytest.mark.parametrize("config", [*shipped()["soft"], *VARIANTS], ids=label)


def routed(config, x_TD=X, sequences=SEQUENCES, ops=None, params=None):
    router = build_router(config, WIDTH, EXPERTS)
    context = RouterContext(layer=0, training=True, num_sequences=sequences)
    return router.route(ops or NumpyOps(), params or router_params(router), x_TD, context)


def shares(config, x_TD=X, sequences=SEQUENCES):
    """(dispatch, combine) by einsum, each (B, S, E, p)."""
    params = router_params(build_router(config, WIDTH, EXPERTS))
    x = (x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)).reshape(sequences, -1, WIDTH)
    mu = params["weight"].reshape(EXPERTS, config.slots_per_expert, WIDTH)
    mu = params["scale"][0] * mu / np.linalg.norm(mu, axis=-1, keepdims=True)
    z = np.exp(np.einsum("bsd,epd->bsep", x, mu))
    return z / z.sum(axis=1, keepdims=True), z / z.sum(axis=(2, 3), keepdims=True)


@every_config
@every_target
def test_shares_are_those_of_the_formula(target, config):
    backend = target.build()
    ops = backend.ops
    router = build_router(config, WIDTH, EXPERTS)
    params = {k: ops.cast(ops.from_numpy(v), backend.parameter_dtype) for k, v in router_params(router).items()}
    x_TD = ops.cast(ops.from_numpy(X), backend.dtype)
    got = routed(config, x_TD, ops=ops, params=params)
    accurate = "float64" if target.dtype == "float64" else "float32"
    for array, want in zip((got.dispatch_BSR, got.combine_BSR), shares(config, ops.to_numpy(x_TD)), strict=True):
        assert ops.dtype(array) == accurate
        want = want.reshape(SEQUENCES, LENGTH, -1)
        assert_close(ops.to_numpy(array), want, 1e-11 if accurate == "float64" else 10 * TOLERANCE[accurate])


@every_config
def test_slots_and_outputs_are_those_of_the_unified_form(config):
    """Slot (e, p) is sum_s D[s, e, p] x_s; the output of token s is sum_ep B[s, e, p] f_e(slot)."""
    routing = routed(config)
    dispatch, combine = shares(config)
    x_BSD = X.reshape(SEQUENCES, LENGTH, WIDTH)
    slots = np.einsum("bsep,bsd->ebpd", dispatch, x_BSD)
    x_RD, counts_E = soft_dispatch(NumpyOps(), X, routing)
    assert_close(x_RD, slots.reshape(-1, WIDTH), 1e-11)
    assert np.asarray(counts_E).tolist() == [SEQUENCES * config.slots_per_expert] * EXPERTS
    assert x_RD.shape[0] == config.assignments(len(X), EXPERTS, SEQUENCES)
    experts = np.arange(1.0, EXPERTS + 1)
    y_RD = (slots * experts[:, None, None, None]).reshape(-1, WIDTH)
    want = np.einsum("bsep,e,ebpd->bsd", combine, experts, slots)
    assert_close(soft_combine(NumpyOps(), y_RD, routing), want.reshape(-1, WIDTH), 1e-11)


@every_config
def test_weights_sum_to_one(config):
    routing = routed(config)
    assert_close(routing.dispatch_BSR.sum(axis=1), np.ones((SEQUENCES, EXPERTS * config.slots_per_expert)), 1e-14)
    assert_close(routing.combine_BSR.sum(axis=2), np.ones((SEQUENCES, LENGTH)), 1e-14)
    assert min(routing.dispatch_BSR.min(), routing.combine_BSR.min()) > 0


@every_config
def test_tokens_may_change_places(config):
    order = rng(2).permutation(LENGTH)
    turned = X.reshape(SEQUENCES, LENGTH, WIDTH)[:, order].reshape(-1, WIDTH)
    before, after = routed(config), routed(config, turned)
    assert_close(after.dispatch_BSR, before.dispatch_BSR[:, order], 1e-14)
    assert_close(after.combine_BSR, before.combine_BSR[:, order], 1e-14)
    slots = [soft_dispatch(NumpyOps(), x, routing)[0] for x, routing in ((X, before), (turned, after))]
    assert_close(slots[1], slots[0], 1e-13)


@every_config
def test_batch_mates_do_not_matter(config):
    whole = routed(config)
    for i in range(SEQUENCES):
        alone = routed(config, X[i * LENGTH : (i + 1) * LENGTH], 1)
        assert_close(alone.dispatch_BSR[0], whole.dispatch_BSR[i], 1e-14)
        assert_close(alone.combine_BSR[0], whole.combine_BSR[i], 1e-14)


def test_later_tokens_change_what_earlier_ones_get():
    assert SoftConfig.looks_ahead
    changed = X.copy()
    changed[LENGTH - 1] += 1
    before, after = (routed(SoftConfig(), x).dispatch_BSR[0, :-1] for x in (X, changed))
    assert np.abs(before - after).max() > 1e-3


def test_lengths_of_tokens_and_of_slots_do_not_matter():
    router = build_router(SoftConfig(), WIDTH, EXPERTS)
    params = router_params(router)
    before = routed(SoftConfig())
    after = routed(SoftConfig(), 7 * X, params=params | {"weight": 3 * params["weight"]})
    assert_close(after.combine_BSR, before.combine_BSR, 1e-11)


@every_config
@every_accurate_training_target
def test_gradients_are_those_of_finite_differences(target, config):
    backend = target.build()
    ops = backend.ops
    router = build_router(config, WIDTH, EXPERTS)
    inputs = router_params(router) | {"x": X}
    reference = routed(config)
    weights = [grid(30 + i, *x.shape) for i, x in enumerate((reference.dispatch_BSR, reference.combine_BSR))]

    def total(ops, inputs, weights):
        got = routed(config, inputs["x"], ops=ops, params={k: v for k, v in inputs.items() if k != "x"})
        return ops.sum(got.dispatch_BSR * weights[0]) + ops.sum(got.combine_BSR * weights[1])

    placed = [ops.cast(ops.from_numpy(v), backend.dtype) for v in weights]
    on_device = {name: ops.cast(ops.from_numpy(value), backend.dtype) for name, value in inputs.items()}
    _, grads = backend.value_and_grad(lambda inputs: total(ops, inputs, placed))(on_device)
    for name, value in inputs.items():
        want = finite_difference(lambda x, name=name: total(NumpyOps(), inputs | {name: x}, weights), value)
        assert_gradient(ops.to_numpy(grads[name]), want, GRADIENT_TOLERANCE[target.dtype], name)


@every_config
def test_parameters(config):
    router = build_router(config, WIDTH, EXPERTS, init_std=0.5)
    assert router.parameter_specs() == [
        ParameterSpec("weight", (EXPERTS * config.slots_per_expert, WIDTH), std=0.5),
        ParameterSpec("scale", (1,), "ones"),
    ]
    assert config.parameter_count(WIDTH, EXPERTS) == sum(spec.size for spec in router.parameter_specs())
    assert router.paper.count("arXiv") == 1
