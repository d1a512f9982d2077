"""The layer where experts choose tokens, or take a mean of them."""

import functools

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import MoEConfig
from moeport.conformance import formulas
from moeport.core.parameters import subtree
from moeport.core.routing import RouterContext
from moeport.model.moe import MoELayer
from moeport.routers.expert_choice import ExpertChoiceConfig
from moeport.routers.sinkhorn_expert_choice import SinkhornExpertChoiceConfig
from moeport.routers.soft import SoftConfig
from moeport.routers.sparsity_constrained import SparsityConstrainedExpertChoiceConfig
from tests.conformance.targets import GRADIENT_TOLERANCE, TOLERANCE, every_accurate_training_target, every_target
from tests.support import assert_close, assert_gradient, finite_difference, grid

EXPERTS, WIDTH, SEQUENCES, LENGTH = 4, 6, 3, 4
X = grid(100, SEQUENCES * LENGTH, WIDTH)
CONTEXT = RouterContext(layer=0, training=True, num_sequences=SEQUENCES)
SHAPES = {"num_experts": EXPERTS, "expert_hidden": 5, "router_z_loss": 0.1}
CONFIGS = {
    "expert_choice": MoEConfig(**SHAPES, router=ExpertChoiceConfig(), routed_scaling_factor=2.5),
    "few tokens": MoEConfig(**SHAPES, router=ExpertChoiceConfig(mean_experts=0.5, group="batch"), activation="gelu"),
    "all tokens": MoEConfig(**SHAPES, router=ExpertChoiceConfig(mean_experts=EXPERTS)),
    "sinkhorn_expert_choice": MoEConfig(**SHAPES, router=SinkhornExpertChoiceConfig()),
    "sparsity_constrained_expert_choice": MoEConfig(**SHAPES, router=SparsityConstrainedExpertChoiceConfig()),
    "soft": MoEConfig(**SHAPES, router=SoftConfig(slots_per_expert=2)),
    "soft, one slot": MoEConfig(**SHAPES, router=SoftConfig()),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def layer_and_params(config):
    layer = MoELayer(config, WIDTH, init_std=0.02, out_std=0.01)
    return layer, {spec.name: grid(i, *spec.shape) for i, spec in enumerate(layer.parameter_specs())}


def on_numpy(config, x_TD=X):
    """(output, metrics, params, the router's decisions) in float64."""
    layer, params = layer_and_params(config)
    chosen = layer.router.route(NumpyOps(), subtree("router", params), x_TD, CONTEXT)
    y_TD, metrics = layer.forward(NumpyOps(), params, x_TD, CONTEXT)
    return y_TD, metrics, params, chosen


def expected(config, params, x_TD, chosen):
    """The output by a loop over assignments, or over the slots of each sequence."""

    def expert(e, x):
        return formulas.mlp(x, params["experts.w_in"][e], params["experts.w_out"][e], config.activation)

    out = np.zeros_like(x_TD)
    if isinstance(config.router, SoftConfig):
        for b in range(SEQUENCES):
            rows = slice(b * LENGTH, (b + 1) * LENGTH)
            for r in range(EXPERTS * config.router.slots_per_expert):
                slot = chosen.dispatch_BSR[b, :, r] @ x_TD[rows]
                y = expert(r // config.router.slots_per_expert, slot)
                out[rows] += np.outer(chosen.combine_BSR[b, :, r], y)
    else:
        for token, e, gate in zip(chosen.token_N, chosen.expert_N, chosen.weight_N, strict=True):
            out[token] += gate * expert(e, x_TD[token])
    return out * config.routed_scaling_factor


@every_config
@every_target
def test_output_is_that_of_a_loop(target, config):
    backend = target.build()
    ops = backend.ops
    layer, params = layer_and_params(config)
    got, metrics = layer.forward(
        ops,
        {name: ops.cast(ops.from_numpy(value), backend.parameter_dtype) for name, value in params.items()},
        ops.cast(ops.from_numpy(X), backend.dtype),
        CONTEXT,
    )
    _, _, _, chosen = on_numpy(config)
    assert ops.dtype(got) == target.dtype
    assert_close(ops.to_numpy(got), expected(config, params, X, chosen), 4 * TOLERANCE[target.dtype])
    rows = config.router.assignments(len(X), EXPERTS, SEQUENCES)
    for counts in (metrics.chosen_E, metrics.served_E):
        assert ops.to_numpy(counts).tolist() == [rows // EXPERTS] * EXPERTS


NAMES = ("x", "router.weight", "experts.w_in")
WEIGHTS = grid(50, *X.shape)


def total(ops, layer, inputs, weights):
    """A sum over the output, with the auxiliary loss."""
    y_TD, metrics = layer.forward(ops, {k: v for k, v in inputs.items() if k != "x"}, inputs["x"], CONTEXT)
    return ops.sum(y_TD * weights) + layer.auxiliary_loss(ops, metrics)


@functools.cache
def finite_differences(case):
    """Of `total`, from numpy in float64."""
    layer, params = layer_and_params(CONFIGS[case])
    inputs = params | {"x": X}

    def moved(name, value):
        return total(NumpyOps(), layer, inputs | {name: value}, WEIGHTS)

    return {name: finite_difference(functools.partial(moved, name), inputs[name]) for name in NAMES}


@pytest.mark.parametrize("case", CONFIGS)
@every_accurate_training_target
def test_gradients_are_those_of_finite_differences(target, case):
    backend = target.build()
    ops = backend.ops
    layer, params = layer_and_params(CONFIGS[case])
    inputs = params | {"x": X}
    on_device = {name: ops.cast(ops.from_numpy(value), backend.dtype) for name, value in inputs.items()}
    placed = ops.cast(ops.from_numpy(WEIGHTS), backend.dtype)
    _, grads = backend.value_and_grad(lambda some: total(ops, layer, on_device | some, placed))(
        {name: on_device[name] for name in NAMES}
    )
    for name, want in finite_differences(case).items():
        assert_gradient(ops.to_numpy(grads[name]), want, GRADIENT_TOLERANCE[target.dtype], name)


def test_a_token_that_no_expert_takes_gets_exactly_nothing():
    y_TD, _, _, chosen = on_numpy(CONFIGS["few tokens"])
    taken = np.isin(np.arange(len(X)), chosen.token_N)
    assert 0 < taken.sum() < len(X)
    assert (y_TD[~taken] == 0).all()
    assert (y_TD[taken] != 0).any(axis=1).all()


@pytest.mark.parametrize(
    "name", ["expert_choice", "sinkhorn_expert_choice", "sparsity_constrained_expert_choice", "soft"]
)
def test_sequences_of_a_batch_do_not_touch_each_other(name):
    config = CONFIGS[name]
    changed = X.copy()
    changed[LENGTH:] = grid(101, (SEQUENCES - 1) * LENGTH, WIDTH)
    before, after = on_numpy(config)[0], on_numpy(config, changed)[0]
    assert_close(after[:LENGTH], before[:LENGTH], 1e-13)
    assert np.abs(after[LENGTH:] - before[LENGTH:]).max() > 0.1


@every_config
def test_there_is_no_load_balancing_loss(config):
    layer, _ = layer_and_params(config)
    _, metrics, _, chosen = on_numpy(config)
    assert (layer.load_balance_coefficient, metrics.load_balance) == (0, None)
    z = np.mean([np.log(np.exp(row).sum()) ** 2 for row in chosen.logits_TE])
    assert_close(layer.auxiliary_loss(NumpyOps(), metrics), 0.1 * z, 1e-13)
