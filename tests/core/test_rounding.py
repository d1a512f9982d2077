from dataclasses import replace

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config import config_from_dict
from moeport.config.model import MoELayerConfig
from moeport.core.dispatch import plan_dispatch
from moeport.core.rounding import round_to_tile, rounded_rows
from moeport.core.routing import RouterContext
from moeport.errors import ConfigError
from moeport.model.moe import MoELayer
from moeport.routers import BY_NAME
from tests.conformance.targets import Target, every_target
from tests.core.routings import routing_of
from tests.support import assert_close, assert_gradient, finite_difference, rng

EXPERTS = 5


def scores(seed, tokens, kinds=None):
    """Scores that sum to 1; with `kinds`, of few values, so that many are equal. Skewed to the first experts."""
    random = rng(seed)
    logits = random.standard_normal((tokens, EXPERTS)) - np.arange(EXPERTS) / 2
    logits = np.round(logits * kinds) / kinds if kinds else logits
    e = np.exp(logits)
    return e / e.sum(1, keepdims=True)


def chosen_from(probs_TE, choices, normalize):
    expert_TK = np.argsort(-probs_TE, axis=1, kind="stable")[:, :choices]
    gate_TK = np.take_along_axis(probs_TE, expert_TK, 1)
    return expert_TK, (gate_TK / gate_TK.sum(1, keepdims=True) if normalize else gate_TK)


def by_loop(probs_TE, expert_TK, gate_TK, tile):
    """{(token, expert): gate} of what is served, and the tokens that fill each expert, one expert after the other."""
    tokens, served, fills = len(probs_TE), {}, {}
    for expert in range(EXPERTS):
        own = [(k, t) for t in range(tokens) for k in range(expert_TK.shape[1]) if expert_TK[t, k] == expert]
        rows = min(round(len(own) / tile) * tile, tokens)
        for k, t in sorted(own, key=lambda place: (-gate_TK[place[1], place[0]], place))[:rows]:
            served[t, expert] = gate_TK[t, k]
        others = [t for t in range(tokens) if t not in {t for _, t in own}]
        best = np.argsort(-probs_TE[others, expert], kind="stable") if others else []
        fills[expert] = [others[i] for i in best][: max(rows - len(own), 0)]
        for t in fills[expert]:
            served[t, expert] = probs_TE[t, expert] * gate_TK[t].sum() / probs_TE[t, expert_TK[t]].sum()
    return served, fills


def rounded(ops, probs_TE, expert_TK, gate_TK, tile, dtype="float64"):
    routing = routing_of(ops, expert_TK, gate_TK, EXPERTS, dtype, probs_TE)
    return round_to_tile(ops, routing, tile)


CASES = [(20, 2, 4), (23, 1, 8), (16, 3, 5), (9, 2, 16), (4, 2, 128), (1, 1, 2), (40, 2, 2), (31, 5, 3)]
every_case = pytest.mark.parametrize(("tokens", "choices", "tile"), CASES)


@every_case
@every_target
def test_it_serves_what_a_loop_serves(target, tokens, choices, tile):
    """Scores of which many are equal, and gates that sum to 1."""
    check(target, tokens, choices, tile, normalize=True, kinds=2)


@pytest.mark.parametrize(("normalize", "kinds"), [(False, None), (True, None), (False, 2)])
@every_case
def test_it_serves_what_a_loop_serves_whatever_the_gates(tokens, choices, tile, normalize, kinds):
    check(Target("numpy", "cpu", "float64"), tokens, choices, tile, normalize, kinds)


def check(target, tokens, choices, tile, normalize, kinds):
    backend = target.build()
    ops, dtype = backend.ops, "float64" if backend.dtype == "float64" else "float32"
    probs_TE = scores(tokens, tokens, kinds).astype(dtype)
    expert_TK, gate_TK = chosen_from(probs_TE, choices, normalize)
    want, fills = by_loop(probs_TE.astype(np.float64), expert_TK, gate_TK.astype(np.float64), tile)
    kept, filled = rounded(ops, probs_TE, expert_TK, gate_TK, tile, dtype)
    expert_N, token_N, weight_N = (ops.to_numpy(x) for x in (filled.expert_N, filled.token_N, filled.weight_N))
    is_served = expert_N < EXPERTS
    got = dict(
        zip(
            zip(token_N[is_served].tolist(), expert_N[is_served].tolist(), strict=True),
            weight_N[is_served],
            strict=True,
        )
    )
    assert got.keys() == want.keys()
    assert is_served.sum() == len(want)  # nobody twice
    assert_close(np.array([got[key] for key in want]), np.array(list(want.values())), 1e-6)
    assert not weight_N[~is_served].any()
    first = len(expert_TK.reshape(-1))
    assert len(expert_N) == first + EXPERTS * min(tile // 2, tokens)
    assert ops.to_numpy(kept.expert_N).tolist() == expert_N[:first].tolist()
    assert (filled.choices_per_token, filled.all_routed, kept.all_routed) == (None, False, False)
    counts_E = ops.to_numpy(plan_dispatch(ops, filled).counts_E)
    assert all(count % tile == 0 or count == tokens for count in counts_E.tolist())
    assert is_served[first:].sum() == sum(map(len, fills.values()))


def test_the_nearest_multiple_is_that_of_the_authors_code():
    """torch.round(counts / tile) * tile, at most all tokens."""
    for tile in (2, 3, 5, 8, 128):
        counts = np.arange(1000)
        want = np.minimum(np.round(counts / tile).astype(int) * tile, 700)
        assert np.asarray(rounded_rows(NumpyOps(), counts, tile, 700)).tolist() == want.tolist()


@pytest.mark.parametrize("name", ["torch", "mindspore"])
def test_gates_that_fill_have_gradients(name):
    """By the scores, through gates that a router has normalised."""
    backend = Target(name, "cpu", "float64").build()
    ops, probs_TE = backend.ops, scores(3, 16)
    expert_TK, _ = chosen_from(probs_TE, 2, normalize=True)
    weights = rng(4).standard_normal(16 * 2 + EXPERTS * 2)

    def loss(ops, probs, weights):
        picked = ops.take_last(probs, ops.from_numpy(expert_TK))
        gates = ops.reshape(picked / ops.sum(picked, axis=-1, keepdims=True), (-1,))
        plain = routing_of(ops, expert_TK, np.zeros(expert_TK.shape), EXPERTS)
        _, filled = round_to_tile(ops, replace(plain, weight_N=gates, probs_TE=probs), 4)
        return ops.sum(filled.weight_N * weights)

    _, grads = backend.value_and_grad(lambda inputs: loss(ops, inputs["p"], ops.from_numpy(weights)))(
        {"p": ops.from_numpy(probs_TE)}
    )
    want = finite_difference(lambda p: loss(NumpyOps(), p, weights), probs_TE)
    assert_gradient(ops.to_numpy(grads["p"]), want, 1e-9)


# ------------------------------------------------------------------ the layer

LAYER = {"num_experts": EXPERTS, "expert_hidden": 3, "capacity": {"policy": "round", "tile": 4}}


def layer_of(router):
    return MoELayer(MoELayerConfig.model_validate({**LAYER, "router": router}), 6, 0.5, 0.5)


def run(layer, training, tokens=22):
    random = rng(5)
    params = {spec.name: random.standard_normal(spec.shape) for spec in layer.parameter_specs()}
    noise = {name: random.random(tokens) for name in layer.noise}
    context = RouterContext(0, training, noise=noise, num_sequences=2)
    return layer.forward(NumpyOps(), params, rng(6).standard_normal((tokens, 6)), context)


ROUNDING = [name for name, router in BY_NAME.items() if router.config_class.gates_follow_probs]


@pytest.mark.parametrize("name", ROUNDING)
def test_a_layer_rounds_in_training_only(name):
    """What it reports is about the router's choices; what fills is reported apart."""
    layer = layer_of({"name": name})
    y_TD, metrics = run(layer, training=True)
    served, chosen = metrics.served_E.sum(), metrics.chosen_E.sum()
    rows = served + round(float(metrics.measured["fill_rate"]) * chosen)
    assert rows % 4 == 0 or 22 in metrics.served_E
    assert metrics.positions_2P.sum(1).tolist() == [chosen, chosen - served]
    assert metrics.capacity is None
    outside, quiet = run(layer, training=False)
    assert (quiet.served_E.tolist(), quiet.measured, quiet.positions_2P) == (quiet.chosen_E.tolist(), {}, None)
    assert np.abs(y_TD - outside).max() > 0


@pytest.mark.parametrize("name", ROUNDING)
def test_gates_of_these_routers_are_in_proportion_to_their_scores(name):
    layer = layer_of({"name": name})
    params = {
        spec.name.removeprefix("router."): rng(5).standard_normal(spec.shape)
        for spec in layer.parameter_specs()
        if spec.name.startswith("router.")
    }
    routing = layer.router.route(NumpyOps(), params, rng(6).standard_normal((22, 6)), RouterContext(0, training=True))
    expert_TK = routing.expert_N.reshape(22, -1)
    ratio_TK = routing.weight_N.reshape(22, -1) / np.take_along_axis(routing.probs_TE, expert_TK, 1)
    assert_close(ratio_TK, np.repeat(ratio_TK[:, :1], expert_TK.shape[1], 1), 1e-12)
    assert all(len(set(row)) == len(row) for row in expert_TK.tolist())


def test_routers_without_such_gates_are_refused():
    for name in BY_NAME.keys() - set(ROUNDING) - {"soft", "expert_choice"}:
        raw = {"model": {"moe": {"router": {"name": name}, "capacity": {"policy": "round"}}}}
        with pytest.raises(ConfigError, match=r"model\.moe\.capacity\.policy"):
            config_from_dict(raw)
    assert config_from_dict({"model": {"moe": {"capacity": {"policy": "round"}}}}).model.moe.capacity.tile == 128


def test_the_torch_layer_rounds_and_trains():
    torch = pytest.importorskip("torch")
    from moeport.torch import MoE

    layer = MoE(16, num_experts=4, expert_hidden=8, capacity={"policy": "round", "tile": 4}, seed=0)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (layer(x).square().sum() + layer.auxiliary_loss).backward()
    filled = round(float(layer.metrics.measured["fill_rate"]) * 36)
    rows = int(layer.metrics.served_E.sum()) + filled
    assert rows % 4 == 0 or int(layer.metrics.served_E.max()) == 18
    assert all(parameter.grad is not None for parameter in layer.parameters())
