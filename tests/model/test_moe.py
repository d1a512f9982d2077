import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import CapacityConfig, LoadBalanceConfig, MoEConfig
from moeport.core.losses import load_balance_loss
from moeport.core.parameters import subtree
from moeport.core.routing import RouterContext
from moeport.model.moe import MoELayer
from moeport.routers.adamoe import AdaMoEConfig
from moeport.routers.cartesian import CartesianConfig
from moeport.routers.gshard import GShardConfig
from moeport.routers.locmoe import LocMoEConfig
from moeport.routers.locmoe_plus import LocMoEPlusConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.sinkhorn import SinkhornTokenChoiceConfig
from moeport.routers.switch import SwitchConfig
from moeport.routers.top_p import TopPConfig
from moeport.routers.topk import TopKConfig
from tests.conformance.targets import TOLERANCE, every_target
from tests.model import reference
from tests.support import assert_close, grid, rng

EXPERTS, WIDTH, TOKENS = 4, 6, 12
SHAPES = {"num_experts": EXPERTS, "expert_hidden": 5, "router_z_loss": 0.1}
TIGHT = {"policy": "factor", "factor": 0.5}
THREE = SHAPES | {"num_experts": 3}
"""For routers that give each expert an equal share of the features."""

CONFIGS = {
    "topk": MoEConfig(**SHAPES),
    "switch": MoEConfig(**SHAPES, router=SwitchConfig()),
    "gshard": MoEConfig(**SHAPES, router=GShardConfig()),
    "sigmoid_bias": MoEConfig(**SHAPES, router=SigmoidBiasConfig(), load_balance=LoadBalanceConfig(coefficient=0.5)),
    "top_p": MoEConfig(**SHAPES, router=TopPConfig(threshold=0.6)),
    "adamoe": MoEConfig(**SHAPES, router=AdaMoEConfig(top_k=2, null_experts=3)),
    "sinkhorn_token_choice": MoEConfig(**SHAPES, router=SinkhornTokenChoiceConfig()),
    "cartesian": MoEConfig(**SHAPES, num_shared_experts=1, router=CartesianConfig()),
    "locmoe": MoEConfig(**THREE, router=LocMoEConfig(nodes=2, epsilon="bias")),
    "locmoe_plus": MoEConfig(**THREE, router=LocMoEPlusConfig(nodes=3)),
    "all experts": MoEConfig(**SHAPES, router=TopKConfig(top_k=EXPERTS)),
    "one expert": MoEConfig(**SHAPES | {"num_experts": 1}, router=TopKConfig(top_k=1)),
    "gelu": MoEConfig(**SHAPES, activation="gelu"),
    "shared": MoEConfig(**SHAPES, num_shared_experts=2, routed_scaling_factor=2.5),
    "shared gelu": MoEConfig(**SHAPES, num_shared_experts=1, activation="gelu"),
    "mixed": MoEConfig(**SHAPES, num_shared_experts=2, shared_mixing="softmax", routed_scaling_factor=2.5),
    "shared, gated by a sigmoid": MoEConfig(
        **SHAPES, num_shared_experts=1, shared_hidden=7, shared_mixing="sigmoid", routed_scaling_factor=2.5
    ),
    "residual": MoEConfig(**SHAPES, residual_hidden=7),
    "all at once": MoEConfig(
        **SHAPES, num_shared_experts=1, shared_mixing="softmax", residual_hidden=3, capacity=CapacityConfig(**TIGHT)
    ),
    "capacity by position": MoEConfig(**SHAPES, capacity=CapacityConfig(**TIGHT)),
    "capacity by probability": MoEConfig(**SHAPES, capacity=CapacityConfig(**TIGHT, drop="probability")),
    "capacity at random": MoEConfig(**SHAPES, capacity=CapacityConfig(**TIGHT, drop="random")),
    "capacity of locmoe_plus": MoEConfig(
        **THREE, router=LocMoEPlusConfig(threshold=1.0), capacity=CapacityConfig(**TIGHT, drop="affinity")
    ),
    "capacity of gshard": MoEConfig(**SHAPES, router=GShardConfig(), capacity=CapacityConfig(**TIGHT)),
    "capacity of adamoe": MoEConfig(
        **SHAPES, router=AdaMoEConfig(top_k=2, null_experts=1), capacity=CapacityConfig(**TIGHT)
    ),
    "capacity of switch": MoEConfig(**SHAPES, router=SwitchConfig(), capacity=CapacityConfig(**TIGHT)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def layer_and_params(config):
    layer = MoELayer(config, WIDTH, init_std=0.02, out_std=0.01)
    return layer, {spec.name: grid(i, *spec.shape) for i, spec in enumerate(layer.parameter_specs())}


def noise_of(layer):
    return {name: rng(7 + i).random(TOKENS).astype(np.float32) for i, name in enumerate(layer.noise)}


def drop_noise(layer):
    """(T, K) as the plain loop takes it; None where drops are not at random."""
    drawn = [noise_T for name, noise_T in noise_of(layer).items() if name.startswith("drop_")]
    return np.stack(drawn, axis=1) if drawn else None


def on_numpy(config, x_TD=None, num_sequences=1):
    """(output, metrics, params, the router's decisions) by numpy in float64."""
    layer, params = layer_and_params(config)
    x_TD = grid(100, TOKENS, WIDTH) if x_TD is None else x_TD
    context = RouterContext(layer=0, training=True, noise=noise_of(layer), num_sequences=num_sequences)
    chosen = layer.router.route(NumpyOps(), subtree("router", params), x_TD, context)
    y_TD, metrics = layer.forward(NumpyOps(), params, x_TD, context)
    return y_TD, metrics, params, chosen


@every_config
@every_target
def test_output_is_that_of_a_loop_over_tokens(target, config):
    backend = target.build()
    ops = backend.ops
    layer, params = layer_and_params(config)
    _, _, _, chosen = on_numpy(config)
    want, kept = reference.moe_layer(config, params, grid(100, TOKENS, WIDTH), chosen, drop_noise(layer))
    got, metrics = layer.forward(
        ops,
        {name: ops.cast(ops.from_numpy(value), backend.parameter_dtype) for name, value in params.items()},
        ops.cast(ops.from_numpy(grid(100, TOKENS, WIDTH)), backend.dtype),
        RouterContext(layer=0, training=True, noise={k: ops.from_numpy(v) for k, v in noise_of(layer).items()}),
    )
    assert ops.dtype(got) == target.dtype
    assert_close(ops.to_numpy(got), want, 4 * TOLERANCE[target.dtype])
    experts = chosen.expert_N.reshape(kept.shape)
    for counts, mask in ((metrics.chosen_E, True), (metrics.served_E, kept)):
        expected = [int(((experts == expert) & mask).sum()) for expert in range(config.num_experts)]
        assert ops.to_numpy(counts).tolist() == expected


@every_config
def test_dropless_serves_every_choice_and_capacity_bounds_each_expert(config):
    _, metrics, _, chosen = on_numpy(config)
    if config.capacity.policy == "dropless":
        assert metrics.served_E.tolist() == metrics.chosen_E.tolist()
        assert metrics.served_E.sum() == (chosen.expert_N < config.num_experts).sum()
    else:
        capacity = int(np.ceil(0.5 * chosen.expert_N.size / config.num_experts))
        assert metrics.chosen_E.max() > capacity
        assert metrics.served_E.tolist() == np.minimum(metrics.chosen_E, capacity).tolist()


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_dropped_tokens_get_exactly_nothing(drop):
    capacity = CapacityConfig(policy="factor", factor=0.25, drop=drop)
    config = MoEConfig(**SHAPES, router=SwitchConfig(), capacity=capacity)
    y_TD, _, params, chosen = on_numpy(config)
    _, kept = reference.moe_layer(config, params, grid(100, TOKENS, WIDTH), chosen)
    dropped = ~kept[:, 0]
    assert 0 < dropped.sum() < TOKENS
    assert (y_TD[dropped] == 0).all()
    assert (y_TD[~dropped] != 0).all()


@pytest.mark.parametrize("name", ["capacity by position", "capacity of gshard", "topk"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_load_balance_loss_is_taken_before_any_drop(name, scope):
    config = CONFIGS[name].model_copy(update={"load_balance": LoadBalanceConfig(scope=scope)})
    _, metrics, _, chosen = on_numpy(config, num_sequences=3)
    assert metrics.load_balance == load_balance_loss(NumpyOps(), chosen, 3 if scope == "sequence" else 1)


def test_scopes_differ():
    losses = [
        on_numpy(MoEConfig(**SHAPES, load_balance=LoadBalanceConfig(scope=scope)), num_sequences=3)[1].load_balance
        for scope in ("batch", "sequence")
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("config", "coefficient"),
    [
        (MoEConfig(), 0.01),
        (MoEConfig(router=SwitchConfig()), 0.01),
        (MoEConfig(router=GShardConfig()), 0.01),
        (MoEConfig(router=SigmoidBiasConfig()), 0.0),
        (MoEConfig(router=SinkhornTokenChoiceConfig()), 0.0),
        (MoEConfig(router=SigmoidBiasConfig(), load_balance=LoadBalanceConfig(coefficient=0.5)), 0.5),
        (MoEConfig(load_balance=LoadBalanceConfig(coefficient=0.0)), 0.0),
    ],
)
def test_coefficient_is_the_routers_own_unless_set(config, coefficient):
    assert MoELayer(config, WIDTH, 0.02, 0.01).load_balance_coefficient == coefficient


def test_auxiliary_loss_is_the_weighted_sum():
    config = MoEConfig(**SHAPES, load_balance=LoadBalanceConfig(coefficient=0.25))
    layer, _ = layer_and_params(config)
    _, metrics, _, chosen = on_numpy(config)
    z = np.mean([np.log(np.exp(row).sum()) ** 2 for row in chosen.logits_TE])
    want = load_balance_loss(NumpyOps(), chosen, 1) * 0.25 + 0.1 * z
    assert_close(layer.auxiliary_loss(NumpyOps(), metrics), want, 1e-14)


def test_losses_that_are_turned_off_are_not_computed():
    config = MoEConfig(num_experts=EXPERTS, expert_hidden=5, load_balance=LoadBalanceConfig(coefficient=0.0))
    layer, _ = layer_and_params(config)
    _, metrics, _, _ = on_numpy(config)
    assert (metrics.load_balance, metrics.router_z, metrics.own_loss, metrics.has_losses) == (None, None, None, False)
    assert (metrics.capacity, metrics.positions_2P, metrics.affinity_4E) == (None, None, None)
    assert layer.auxiliary_loss(NumpyOps(), metrics) == 0.0
    filled = metrics.filled(NumpyOps(), "float32")
    assert [getattr(filled, name).any() for name in filled._fields if getattr(metrics, name) is None] == [False] * 6


def test_one_token():
    config = CONFIGS["shared"]
    x_TD = grid(100, 1, WIDTH)
    y_TD, metrics, params, chosen = on_numpy(config, x_TD)
    assert_close(y_TD, reference.moe_layer(config, params, x_TD, chosen)[0], 1e-13)
    assert metrics.served_E.sum() == 2


def test_parameters():
    layer, _ = layer_and_params(CONFIGS["shared"])
    assert {spec.name: spec.shape for spec in layer.parameter_specs()} == {
        "router.weight": (4, 6),
        "experts.w_in": (4, 10, 6),
        "experts.w_out": (4, 6, 5),
        "shared.w_in": (20, 6),
        "shared.w_out": (6, 10),
    }
    assert {spec.name: spec.std for spec in layer.parameter_specs()} == {
        "router.weight": 0.02,
        "experts.w_in": 0.02,
        "experts.w_out": 0.01,
        "shared.w_in": 0.02,
        "shared.w_out": 0.01,
    }


def test_parameters_of_mixing_and_of_the_dense_block():
    layer, _ = layer_and_params(CONFIGS["all at once"])
    specs = {spec.name: (spec.shape, spec.std) for spec in layer.parameter_specs()}
    assert specs["mixing.weight"] == ((2, 6), 0.02)
    assert (specs["dense.w_in"], specs["dense.w_out"]) == (((6, 6), 0.02), ((6, 3), 0.01))


def test_parameters_of_gated_shared_experts_of_their_own_width():
    layer, _ = layer_and_params(CONFIGS["shared, gated by a sigmoid"])
    shapes = {spec.name: spec.shape for spec in layer.parameter_specs()}
    assert shapes["mixing.weight"] == (1, 6)
    assert (shapes["shared.w_in"], shapes["shared.w_out"]) == ((14, 6), (6, 7))


def test_shared_experts_are_mixed_where_the_router_or_the_config_says():
    mixed = {config.mixes_shared_experts for config in (CONFIGS["cartesian"], CONFIGS["mixed"])}
    assert (mixed, CONFIGS["shared"].mixes_shared_experts) == ({True}, False)
    assert not MoEConfig(router=CartesianConfig(), shared_mixing="add").mixes_shared_experts


@pytest.mark.parametrize("drop", ["position", "probability", "affinity", "random"])
def test_only_random_drops_with_a_capacity_draw_numbers(drop):
    for policy in ("dropless", "factor"):
        capacity = CapacityConfig(policy=policy, drop=drop)
        layer = MoELayer(MoEConfig(**SHAPES, router=GShardConfig(), capacity=capacity), WIDTH, 0.02, 0.01)
        drawn = ("drop_0", "drop_1") if (policy, drop) == ("factor", "random") else ()
        assert layer.noise == ("second_expert", *drawn)


def test_random_drops_outside_training_are_by_position():
    by_position, at_random = (
        MoELayer(CONFIGS[f"capacity {drop}"], WIDTH, 0.02, 0.01) for drop in ("by position", "at random")
    )
    _, params = layer_and_params(CONFIGS["capacity by position"])
    x_TD, context = grid(100, TOKENS, WIDTH), RouterContext(layer=0, training=False)
    got, want = (np.asarray(layer.forward(NumpyOps(), params, x_TD, context)[0]) for layer in (at_random, by_position))
    assert got.tolist() == want.tolist()
    _, metrics, _, _ = on_numpy(CONFIGS["capacity at random"])
    assert metrics.served_E.sum() < metrics.chosen_E.sum()


def test_gelu_experts_have_no_gate():
    layer, _ = layer_and_params(CONFIGS["shared gelu"])
    shapes = {spec.name: spec.shape for spec in layer.parameter_specs()}
    assert (shapes["experts.w_in"], shapes["shared.w_in"]) == ((4, 5, 6), (5, 6))
