import math
from typing import Any

import numpy as np
import pytest
from scipy.special import rel_entr

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config import config_from_dict
from moeport.conformance.formulas import softmax
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Topology
from moeport.errors import ConfigError
from moeport.routers import build_router
from moeport.routers.grap import GrAPConfig
from moeport.routers.locmoe import LocMoEConfig
from moeport.routers.locmoe_plus import LocMoEPlusConfig
from tests.conformance.targets import GRADIENT_TOLERANCE, TOLERANCE, every_accurate_training_target, every_target
from tests.routers.examples import EXPERTS, TOKENS, WIDTH, choices, hidden_states, label, route
from tests.support import assert_close, assert_gradient, finite_difference, rng

VARIANTS = [
    LocMoEConfig(nodes=2),
    LocMoEConfig(scores="mean", relu="before_choice", nodes=2),
    LocMoEConfig(relu="after_choice", epsilon="bias", temperature=0.5, nodes=3, locality_smoothing=0.2),
    LocMoEConfig(epsilon="noise", locality_coefficient=0.0),
]
"""Further configs for the tests of all routers."""
PRINTED = LocMoEConfig(scores="mean", relu="before_choice")
BOTH = pytest.mark.parametrize("make", [LocMoEConfig, LocMoEPlusConfig], ids=["locmoe", "locmoe_plus"])


def gate_rows(d_model=WIDTH, num_experts=EXPERTS):
    """The fixed gate as a matrix (E, D): what it makes of the unit vectors."""
    router: Any = build_router(LocMoEConfig(), d_model, num_experts)
    return router.group_means(NumpyOps(), np.eye(d_model)).T


def test_gate_rows_are_those_of_the_paper():
    """(n / d) on the columns from i d / n to (i + 1) d / n, 0 elsewhere."""
    rows = gate_rows(12, 3)
    assert rows.tolist() == [[0.25 if 4 * i <= j < 4 * (i + 1) else 0.0 for j in range(12)] for i in range(3)]


@pytest.mark.parametrize(("d_model", "num_experts"), [(12, 3), (16, 8), (16, 16), (5120, 16)])
def test_gates_are_orthogonal_and_of_equal_length(d_model, num_experts):
    rows = gate_rows(d_model, num_experts)
    assert_close(rows @ rows.T, np.eye(num_experts) * num_experts / d_model, 1e-14)


@pytest.mark.parametrize("config", [LocMoEConfig(), LocMoEConfig(scores="mean"), LocMoEPlusConfig()], ids=label)
def test_loads_of_isotropic_tokens_are_equal(config):
    """Lemma 2: P(first choice i) = 1 / n; chi-square over 8 experts, 7 degrees of freedom, 0.1 % on either side."""
    tokens = 20_000
    experts, _ = choices(route(config, x_TD=rng(3).standard_normal((tokens, WIDTH))))
    loads = np.bincount(experts[:, 0], minlength=EXPERTS)
    assert 0.6 < np.sum((loads - tokens / EXPERTS) ** 2) / (tokens / EXPERTS) < 24.3


def test_as_printed_tokens_without_a_positive_mean_add_to_the_load_of_expert_0():
    """Of 4 experts it has (1 - 2^-4) / 4 + 2^-4 of isotropic tokens."""
    tokens, want = 20_000, (1 - 2**-4) / 4 + 2**-4
    experts, _ = choices(route(PRINTED, x_TD=rng(3).standard_normal((tokens, WIDTH)), num_experts=4))
    assert abs((experts == 0).mean() - want) < 4 * math.sqrt(want * (1 - want) / tokens)


def test_printed_gates_are_almost_uniform_and_ours_are_not():
    """Unit-RMS tokens of the paper's width: the best of 16 has little more than 1/16 as printed."""
    x_TD = rng(4).standard_normal((64, 5120))
    gates = {}
    for scores in ("mean", "cosine"):
        router: Any = build_router(LocMoEConfig(scores=scores), 5120, 16)
        routing = router.route(NumpyOps(), {}, x_TD, RouterContext(0, True))
        gates[scores] = routing.weight_N.mean()
        want = 1.0 if scores == "cosine" else math.sqrt(16 / 5120)
        assert_close(routing.logits_TE.std(), want, 0.1)
    assert 1 / 16 < gates["mean"] < 1.15 / 16
    assert gates["cosine"] > 3 / 16


def test_cosines_are_those_of_the_gate_rows():
    routing = route(LocMoEConfig(temperature=0.5))
    rows = gate_rows()
    for x, logits, affinity, expert in zip(
        hidden_states(), routing.logits_TE, routing.affinity_N, routing.expert_N, strict=True
    ):
        cosines = rows @ x / (np.linalg.norm(rows, axis=1) * np.linalg.norm(x))
        assert_close(logits, cosines * math.sqrt(WIDTH) / 0.5, 1e-12)
        assert expert == cosines.argmax()
        assert_close(affinity, cosines[expert], 1e-12)
        assert np.abs(cosines).max() <= 1


def test_as_printed():
    """softmax(ReLU(w x)); the gate is its largest share."""
    routing = route(PRINTED)
    means = np.maximum(hidden_states().reshape(TOKENS, EXPERTS, -1).mean(-1), 0)
    probs = np.array([softmax(row) for row in means])
    assert_close(routing.probs_TE, probs, 1e-14)
    assert routing.expert_N.tolist() == probs.argmax(axis=1).tolist()
    assert_close(routing.weight_N, probs.max(axis=1), 1e-14)


@pytest.mark.parametrize(("relu", "expert"), [("none", 3), ("after_choice", 3), ("before_choice", 0)])
def test_a_token_without_a_positive_score_ties_only_as_printed(relu, expert):
    x_TD = -np.ones((1, WIDTH))
    x_TD[0, 6:8] = -0.5
    routing = route(LocMoEConfig(relu=relu), x_TD=x_TD)
    assert routing.expert_N.tolist() == [expert]
    assert (routing.weight_N[0] == 1 / EXPERTS) == (relu != "none")


def test_epsilon_as_a_bias_is_added_to_the_scores():
    config = LocMoEConfig(epsilon="bias")
    router: Any = build_router(config, WIDTH, EXPERTS)
    assert router.parameter_specs() == [ParameterSpec("bias", (EXPERTS,), "zeros")]
    bias = rng(5).standard_normal(EXPERTS)
    got = route(config, {"bias": bias})
    assert_close(got.logits_TE, route(LocMoEConfig()).logits_TE + bias, 1e-14)


def test_epsilon_as_noise_has_the_stated_moments_in_training_alone():
    config, x_TD = LocMoEConfig(epsilon="noise"), rng(6).standard_normal((20_000, WIDTH))
    noise = route(config, x_TD=x_TD).logits_TE - route(LocMoEConfig(), x_TD=x_TD).logits_TE
    assert_close(noise.std(axis=0), np.full(EXPERTS, 1 / EXPERTS), 0.03)
    assert np.abs(noise.mean(axis=0)).max() < 0.005
    assert np.abs(np.corrcoef(noise.T) - np.eye(EXPERTS)).max() < 0.04
    calm = route(config, x_TD=x_TD, training=False)
    assert np.array_equal(calm.logits_TE, route(LocMoEConfig(), x_TD=x_TD).logits_TE)


def divergence(probs_TE, nodes, node, eta):
    """KL(D_c || D_l) of one node, by scipy."""
    experts = probs_TE.shape[1]
    local = [expert * nodes // experts == node for expert in range(experts)]
    localized = np.where(local, (1 - eta) / max(sum(local), 1), eta / max(experts - sum(local), 1))
    if sum(local) in (0, experts):
        localized = np.full(experts, 1 / experts)
    assert_close(localized.sum(), 1.0, 1e-15)
    return rel_entr(probs_TE.mean(axis=0), localized).sum()


@BOTH
@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8])
def test_locality_loss_is_the_mean_divergence_of_the_nodes(make, nodes):
    config = make(nodes=nodes, locality_coefficient=0.5, locality_smoothing=0.1)
    routing = route(config)
    owner = np.arange(TOKENS) * nodes // TOKENS
    pieces = [divergence(routing.probs_TE[owner == node], nodes, node, 0.1) for node in range(nodes)]
    assert_close(routing.own_loss, 0.5 * np.mean(pieces), 1e-12)


@BOTH
@pytest.mark.parametrize(("nodes", "node"), [(1, 0), (2, 1), (3, 0), (16, 1), (16, 2)])
def test_without_the_option_the_cluster_says_which_experts_are_local(make, nodes, node):
    """Expert e of 8 is on node e * nodes // 8; of 16 nodes every second has none."""
    router: Any = build_router(make(), WIDTH, EXPERTS)
    context = RouterContext(0, True, topology=Topology(nodes, node))
    routing = router.route(NumpyOps(), {}, hidden_states(), context)
    assert_close(routing.own_loss, 0.01 * divergence(routing.probs_TE, nodes, node, 0.05), 1e-11)


def test_fewer_tokens_than_nodes():
    routing = route(LocMoEConfig(nodes=4, locality_coefficient=1.0), x_TD=hidden_states(tokens=2))
    pieces = [divergence(routing.probs_TE[token : token + 1], 4, node, 0.05) for token, node in ((0, 0), (1, 2))]
    assert_close(routing.own_loss, np.mean(pieces), 1e-12)


def test_no_coefficient_no_loss():
    assert route(LocMoEConfig(locality_coefficient=0.0, nodes=2)).own_loss is None


def loss_of(probs_TE, config, nodes=1, node=0):
    router: Any = build_router(config, WIDTH, probs_TE.shape[1])
    return router.locality_loss(NumpyOps(), probs_TE, Topology(nodes, node))


def test_the_loss_is_zero_where_tokens_are_as_local_as_asked():
    config = LocMoEConfig(locality_coefficient=1.0, locality_smoothing=0.2)
    local_first, local_second = np.array([0.4, 0.4, 0.1, 0.1]), np.array([0.1, 0.1, 0.4, 0.4])
    assert abs(loss_of(local_first[None], config, 2, 0)) < 1e-15
    halves = np.concatenate([np.tile(local_first, (3, 1)), np.tile(local_second, (3, 1))])
    emulated = config.model_copy(update={"nodes": 2})
    assert abs(loss_of(halves, emulated)) < 1e-15
    assert loss_of(halves[::-1], emulated) > 0.5


def test_a_share_of_zero_is_finite():
    probs_TE = np.array([[1.0, 0.0, 0.0, 0.0]])
    config = LocMoEConfig(locality_coefficient=1.0)
    assert_close(loss_of(probs_TE, config, 2, 1), math.log(2 / 0.05), 1e-14)


@BOTH
def test_its_gradient_moves_tokens_towards_experts_of_their_node(make):
    """A step of descent along x raises the probability of local experts, for every node."""
    config = make(nodes=2, locality_coefficient=1.0)
    before = hidden_states()
    gradient = finite_difference(lambda x_TD: route(config, x_TD=x_TD).own_loss, before).value

    def local_share(x_TD):
        probs = route(config, x_TD=x_TD).probs_TE
        return [probs[: TOKENS // 2, : EXPERTS // 2].sum(), probs[TOKENS // 2 :, EXPERTS // 2 :].sum()]

    after = local_share(before - 0.1 * gradient / np.abs(gradient).max())
    assert all(new > old for new, old in zip(after, local_share(before), strict=True))


@every_target
def test_locality_loss_on_every_backend(target):
    """Tokens that lean to some experts, so that no loss is near 0."""
    ops = target.build().ops
    x_TD = hidden_states() + 2 * np.arange(WIDTH) / WIDTH
    kind = "float64" if target.dtype == "float64" else "float32"
    for config, topology in (
        (LocMoEConfig(), Topology(2, 0)),
        (PRINTED, Topology()),
        (LocMoEPlusConfig(nodes=3), None),
    ):
        router: Any = build_router(config, WIDTH, EXPERTS)
        context = RouterContext(0, True, topology=topology or Topology())
        want = router.route(NumpyOps(), {}, x_TD, context).own_loss
        got = router.route(ops, {}, ops.cast(ops.from_numpy(x_TD), kind), context).own_loss
        assert abs(float(ops.to_numpy(got)) - want) < 40 * TOLERANCE[kind] * 0.01


@every_accurate_training_target
def test_the_gradient_of_the_bias(target):
    backend, config = target.build(), LocMoEConfig(epsilon="bias", nodes=2, locality_coefficient=0.5)
    ops, router = backend.ops, build_router(config, WIDTH, EXPERTS)
    x_TD = ops.cast(ops.from_numpy(hidden_states()), target.dtype)
    bias = rng(8).standard_normal(EXPERTS) / 4

    def total(params):
        routing = router.route(ops, params, x_TD, RouterContext(0, True))
        return ops.sum(routing.weight_N) + routing.own_loss

    def reference(bias):
        routing = route(config, {"bias": bias})
        return routing.weight_N.sum() + routing.own_loss

    _, grads = backend.value_and_grad(total)({"bias": ops.cast(ops.from_numpy(bias), target.dtype)})
    want = finite_difference(reference, bias)
    assert np.abs(want.value).max() > 1e-2
    assert_gradient(ops.to_numpy(grads["bias"]), want, GRADIENT_TOLERANCE[target.dtype])


@BOTH
def test_more_nodes_than_experts_are_a_problem(make):
    assert make(nodes=8).problems(8) == []
    assert make(nodes=9).problems(8) == [
        ("nodes", "leaves nodes without an expert", "at most model.moe.num_experts (8)")
    ]


@BOTH
def test_experts_must_divide_the_width(make):
    moe = {"num_experts": 6, "router": {"name": make().name}}
    with pytest.raises(ConfigError) as error:
        config_from_dict({"model": {"d_model": 32, "moe": moe}})
    assert (
        f"model.d_model: not divisible by model.moe.num_experts = 6, while {make().name} gives each expert an equal "
        "share of the features (got 32); expected a multiple of 6"
    ) in str(error.value)


def test_drop_by_affinity_needs_affinities():
    with pytest.raises(ConfigError) as error:
        config_from_dict({"model": {"moe": {"capacity": {"policy": "factor", "drop": "affinity"}}}})
    assert (
        "model.moe.capacity.drop: topk returns no affinities to choose by (got affinity); expected probability, which "
        "chooses by the gate, or a router with affinities: locmoe or locmoe_plus"
    ) in str(error.value)


def test_the_shared_options_are_documented():
    assert all(field.description for field in GrAPConfig.model_fields.values())
