"""Faults that auxiliary losses had in other trainers, one test each: none of them is here."""

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import CapacityConfig, LoadBalanceConfig, MoEConfig
from moeport.core.losses import load_balance_loss
from moeport.core.parameters import initial_value, subtree
from moeport.core.routing import RouterContext
from moeport.model.moe import MoELayer
from moeport.routers import BY_NAME
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.switch import SwitchConfig
from moeport.routers.top_p import TopPConfig
from moeport.routers.topk import TopKConfig
from tests.backends.models import training_model
from tests.conformance.targets import GRADIENT_TOLERANCE, TOLERANCE, Target, every_target
from tests.core.routings import routing_of
from tests.model.models import batch_of, model_config, rows
from tests.support import assert_close, assert_gradient, finite_difference, grid, rng

EXPERTS, WIDTH, TOKENS, SEQUENCES = 4, 8, 24, 4
WITHOUT_SCORES = ("hash", "rre", "random")
BALANCED = [
    name
    for name, router in BY_NAME.items()
    if not (router.config_class.fixed_load or router.config_class.even_load or name in WITHOUT_SCORES)
]
"""Routers that choose by scores, so that a load-balancing loss has something to move."""
every_balanced_router = pytest.mark.parametrize("router", BALANCED)
every_scope = pytest.mark.parametrize("scope", ["batch", "sequence"])
TOKEN_IDS = rng(4).integers(10, size=TOKENS)
TORCH = Target("torch", "cpu", "float64")


def layer_of(router, coefficient=0.5, scope="batch", capacity=None, router_z_loss=0.1, **options):
    config = MoEConfig(
        num_experts=EXPERTS,
        expert_hidden=3,
        router=BY_NAME[router].config_class(**options),
        load_balance=LoadBalanceConfig(coefficient=coefficient, scope=scope),
        capacity=capacity or CapacityConfig(),
        router_z_loss=router_z_loss,
    )
    return MoELayer(config, WIDTH, init_std=0.02, out_std=0.01, vocab_size=10)


def params_of(layer):
    return {
        spec.name: initial_value(spec, 0).astype(np.float64) if spec.is_table else grid(i, *spec.shape)
        for i, spec in enumerate(layer.parameter_specs())
    }


def tokens(seed=1):
    """Hidden states that lean to some experts."""
    return rng(seed).standard_normal((TOKENS, WIDTH)) + np.linspace(1, 0, WIDTH)


def metrics_of(layer, ops=None, params=None, x_TD=None, sequences=SEQUENCES):
    """Metrics of a layer in training; the noise of a token is the same in every batch that has it."""
    ops, x_TD = ops or NumpyOps(), tokens() if x_TD is None else x_TD
    noise = {
        name: ops.from_numpy(np.resize(rng(3 + i).random(TOKENS, np.float32), x_TD.shape[0]))
        for i, name in enumerate(layer.noise)
    }
    ids_T = ops.from_numpy(np.resize(TOKEN_IDS, x_TD.shape[0]))
    context = RouterContext(layer=0, training=True, token_ids_T=ids_T, noise=noise, num_sequences=sequences)
    params = {name: ops.from_numpy(value) for name, value in params_of(layer).items()} | (params or {})
    return layer.forward(ops, params, x_TD, context)[1]


def losses_of(metrics):
    return [float(loss or 0.0) for loss in (metrics.load_balance, metrics.router_z, metrics.own_loss)]


# ------------------------------------------------------------------ 1: a sigmoid whose scores all vanish


@pytest.mark.parametrize("shift", [0.0, -20.0, -60.0])
@every_target
def test_sigmoid_scores_cannot_push_the_loss_below_one_by_vanishing(target, shift):
    """P is normalised without an epsilon, so at an even load the loss is 1 however small the scores are."""
    backend = target.build()
    ops, layer = backend.ops, layer_of("sigmoid_bias", top_k=1)
    weight_ED = 4 * np.eye(EXPERTS, WIDTH)
    weight_ED[:, -1] = shift
    x_TD = np.tile(np.eye(EXPERTS, WIDTH), (TOKENS // EXPERTS, 1))
    x_TD[:, -1] = 1.0
    x_TD = ops.cast(ops.from_numpy(x_TD), backend.dtype)
    params = {"weight": ops.cast(ops.from_numpy(weight_ED), backend.dtype), "bias": ops.zeros((EXPERTS,), "float32")}
    routing = layer.router.route(ops, params, x_TD, RouterContext(0, True))
    accurate = "float64" if target.dtype == "float64" else "float32"
    assert_close(ops.to_numpy(ops.sum(routing.probs_TE, axis=1)), np.ones(TOKENS), 4 * TOLERANCE[accurate])
    assert_close(ops.to_numpy(load_balance_loss(ops, routing, 1)), 1.0, 4 * TOLERANCE[accurate])


def test_no_gradient_makes_all_sigmoid_scores_smaller():
    """At vanishing scores the loss does not depend on their common size, so it cannot be lowered by it."""
    layer = layer_of("sigmoid_bias", top_k=1)
    losses = []
    for shift in (-30.0, -40.0):
        logits = tokens()[:, :EXPERTS] + shift
        routing = layer.router.route(
            NumpyOps(), {"weight": np.eye(EXPERTS), "bias": np.zeros(EXPERTS)}, logits, RouterContext(0, True)
        )
        losses.append(load_balance_loss(NumpyOps(), routing, 1))
    assert losses[0] > 1.01
    assert_close(losses[1], losses[0], 1e-11)


# ------------------------------------------------------------------ 2: counts after the capacity mask


@every_scope
@pytest.mark.parametrize("drop", ["position", "probability", "random"])
@every_balanced_router
def test_losses_count_choices_before_the_capacity_drops_them(router, drop, scope):
    capacity = CapacityConfig(policy="factor", factor=0.25, drop=drop)
    free, tight = (
        metrics_of(layer_of(router, scope=scope)),
        metrics_of(layer_of(router, scope=scope, capacity=capacity)),
    )
    assert tight.served_E.sum() < free.served_E.sum()
    assert losses_of(tight) == losses_of(free)
    assert tight.chosen_E.tolist() == free.chosen_E.tolist()


# ------------------------------------------------------------------ 3: padding counted as choices


@pytest.mark.parametrize("capacity", [None, CapacityConfig(policy="factor", factor=0.25)], ids=["free", "tight"])
@every_balanced_router
def test_rows_that_pad_the_experts_are_not_counted(router, capacity):
    """A compiled graph of MindSpore gives every expert as many rows as the fullest may need."""
    backend = Target("mindspore", "cpu", "float64").build()
    layer = layer_of(router, scope="sequence", capacity=capacity)
    want = losses_of(metrics_of(layer))
    for expert_rows in (TOKENS, 4 * TOKENS):
        ops = backend.graphs.ops(expert_rows, differentiable=False)
        got = metrics_of(layer, ops, x_TD=ops.from_numpy(tokens()))
        filled = got.filled(ops, "float64")
        losses = (filled.load_balance, filled.router_z, filled.own_loss)
        assert_close([float(ops.to_numpy(x)) for x in losses], want, 1e-12)


def test_choices_that_go_nowhere_are_counted_for_no_expert():
    experts, gates = [[0, 4], [1, 4], [2, 4], [3, 0]], np.ones((4, 2))
    probs_TE = grid(5, 4, EXPERTS) ** 2 + 0.1
    loss = load_balance_loss(NumpyOps(), routing_of(NumpyOps(), experts, gates, EXPERTS, probs_TE=probs_TE), 1)
    f_E = np.array([2, 1, 1, 1]) / 8
    assert_close(loss, EXPERTS * (f_E * probs_TE.mean(axis=0)).sum(), 1e-14)


# ------------------------------------------------------------------ 4: recomputation counts twice


@pytest.mark.parametrize("router", ["topk", "top_p", "gshard", "sigmoid_bias", "cartesian"])
def test_recomputed_activations_neither_double_nor_lose_a_loss(router):
    """Reported numbers are those of one forward pass, and the router's gradient is there once."""
    config = model_config(router, moe={"load_balance": LoadBalanceConfig(coefficient=0.5), "router_z_loss": 0.2})
    terms, gradients = [], []
    for recompute in (False, True):
        training = training_model(config, "float64", activation_checkpointing=recompute)
        terms.append(training.accumulate(batch_of(training.model), 1.0))
        gradients.append(training.gradients())
    for name in ("loss", "load_balance", "router_z", "chosen_LE"):
        assert getattr(terms[1], name).tolist() == getattr(terms[0], name).tolist(), name
    for name, want in gradients[0].items():
        assert_close(gradients[1][name], want, 1e-14, name)
    without = training_model(
        model_config(router, moe={"load_balance": LoadBalanceConfig(coefficient=0.0), "router_z_loss": 0.0}), "float64"
    )
    without.accumulate(batch_of(without.model), 1.0)
    moved = [name for name, value in without.gradients().items() if np.abs(gradients[1][name] - value).max() > 1e-4]
    assert any(".router." in name for name in moved)


# ------------------------------------------------------------------ 5: scale under data parallelism


@every_scope
@every_balanced_router
def test_the_scale_does_not_depend_on_how_many_ranks_share_a_batch(router, scope):
    """Ranks whose tokens are alike: the mean of their losses and gradients is that of the batch of all of them."""
    layer = layer_of(router, scope=scope)
    ops = TORCH.build().ops
    alone = metrics_of(layer)
    together = metrics_of(layer, x_TD=np.tile(tokens(), (2, 1)), sequences=2 * SEQUENCES)
    assert_close(losses_of(together), losses_of(alone), 1e-13)
    halves = [gradient_by_tokens(layer, ops, tokens()), gradient_by_tokens(layer, ops, np.tile(tokens(), (2, 1)), 2)]
    assert_close(halves[1][:TOKENS] + halves[1][TOKENS:], halves[0], 1e-12)


def gradient_by_tokens(layer, ops, x_TD, copies=1):
    """Gradient of the auxiliary loss by the hidden states."""

    def loss(inputs):
        return layer.auxiliary_loss(ops, metrics_of(layer, ops, x_TD=inputs["x"], sequences=copies * SEQUENCES))

    return ops.to_numpy(TORCH.build().value_and_grad(loss)({"x": ops.from_numpy(x_TD)})[1]["x"])


PER_TOKEN = [name for name in BALANCED if name not in ("locmoe", "locmoe_plus", "sinkhorn_token_choice")]
"""Routers whose choices and own losses are those of each token by itself."""


@pytest.mark.parametrize("router", PER_TOKEN)
def test_the_sequence_loss_of_a_batch_is_the_mean_of_its_ranks(router):
    """Exact for any tokens: f and P are those of a sequence, which is never cut."""
    layer, x_TD, length = layer_of(router, scope="sequence"), tokens(), TOKENS // SEQUENCES
    noise = {name: np.resize(rng(3 + i).random(TOKENS, np.float32), TOKENS) for i, name in enumerate(layer.noise)}
    parts = []
    for start in range(0, TOKENS, 2 * length):
        own = slice(start, start + 2 * length)
        drawn = {name: u[own] for name, u in noise.items()}
        context = RouterContext(0, True, token_ids_T=TOKEN_IDS[own], noise=drawn, num_sequences=2)
        parts.append(losses_of(layer.forward(NumpyOps(), params_of(layer), x_TD[own], context)[1]))
    assert_close(np.mean(parts, axis=0), losses_of(metrics_of(layer)), 1e-13)


def test_the_batch_loss_is_that_of_each_rank_and_not_of_all():
    """Two ranks whose tokens go each to an expert of its own: each pays for itself, though both together are even."""
    ranks = [routing_of(NumpyOps(), [[e]] * 4, np.ones((4, 1)), 2, probs_TE=np.eye(2)[[e] * 4]) for e in (0, 1)]
    both = routing_of(NumpyOps(), [[0]] * 4 + [[1]] * 4, np.ones((8, 1)), 2, probs_TE=np.eye(2)[[0] * 4 + [1] * 4])
    assert [load_balance_loss(NumpyOps(), routing, 1) for routing in ranks] == [2.0, 2.0]
    assert load_balance_loss(NumpyOps(), both, 1) == 1.0


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("router", ["topk", "gshard", "top_p", "adamoe"])
def test_micro_batches_neither_enlarge_nor_shrink_the_losses(router, parts):
    """Gradient accumulation: the router's gradient is that of the whole batch."""
    config = model_config(router, moe={"load_balance": LoadBalanceConfig(coefficient=0.5, scope="sequence")})
    gradients = []
    for number in (1, parts):
        training = training_model(config, "float64")
        batch, size = batch_of(training.model), 4 // number
        for start in range(0, 4, size):
            training.accumulate(rows(batch, start, start + size), 1 / number)
        gradients.append(training.gradients())
    for name, want in gradients[0].items():
        assert_close(gradients[1][name], want, 1e-12, name)


# ------------------------------------------------------------------ 6: no gradient reaches the router


@every_scope
@every_balanced_router
def test_the_gradient_of_the_loss_reaches_the_router(router, scope):
    """Its weights, or where it has none the hidden states, with the right scale: finite differences of the formula."""
    layer, coefficient = layer_of(router, coefficient=0.5, scope=scope, router_z_loss=0.0), 0.5
    sequences = SEQUENCES if scope == "sequence" else 1
    name = next((f"router.{spec.name}" for spec in layer.router.parameter_specs() if spec.trainable), "x")
    start = tokens() if name == "x" else params_of(layer)[name]
    ops = TORCH.build().ops

    def placed(value, ops):
        return {"x_TD": value} if name == "x" else {"params": {name: value}, "x_TD": ops.from_numpy(tokens())}

    def formula(value):
        """coefficient * E * sum of f P, by loops over sequences and experts."""
        params = subtree("router", params_of(layer) | ({} if name == "x" else {name: value}))
        noise = {key: rng(3 + i).random(TOKENS, np.float32) for i, key in enumerate(layer.noise)}
        context = RouterContext(0, True, token_ids_T=TOKEN_IDS, noise=noise, num_sequences=SEQUENCES)
        routing = layer.router.route(NumpyOps(), params, value if name == "x" else tokens(), context)
        chosen = routing.expert_N.reshape(TOKENS, -1)
        if router == "sigmoid_bias":
            chosen = np.argsort(-routing.probs_TE, axis=1, kind="stable")
        chosen = chosen[:, : routing.balanced_choices]
        total, length, outcomes = 0.0, TOKENS // sequences, EXPERTS + routing.null_experts
        for start in range(0, TOKENS, length):
            own = slice(start, start + length)
            for expert in range(outcomes):
                f = (chosen[own] == min(expert, EXPERTS)).mean() / (routing.null_experts if expert >= EXPERTS else 1)
                total += f * routing.probs_TE[own, expert].mean() * outcomes / sequences
        return coefficient * total

    def loss(inputs):
        metrics = metrics_of(layer, ops, **placed(inputs[name], ops))
        return metrics.load_balance * ops.constant_like(coefficient, metrics.load_balance)

    value, grads = TORCH.build().value_and_grad(loss)({name: ops.from_numpy(start)})
    want = finite_difference(formula, start)
    assert_close(ops.to_numpy(value), formula(start), 1e-12)
    assert np.abs(want.value).max() > 1e-3
    assert_gradient(ops.to_numpy(grads[name]), want, GRADIENT_TOLERANCE["float64"])


@pytest.mark.parametrize("router", ["switch", "gshard", "sigmoid_bias", "locmoe", "locmoe_plus", "cartesian"])
def test_the_coefficient_is_the_weight_of_the_gradient(router):
    """Through the whole model: twice the coefficient moves every gradient twice as far from that without the loss."""
    gradients = []
    for coefficient in (0.0, 0.3, 0.6):
        training = training_model(
            model_config(router, moe={"load_balance": LoadBalanceConfig(coefficient=coefficient)}), "float64"
        )
        training.accumulate(batch_of(training.model), 1.0)
        gradients.append(training.gradients())
    without, once, twice = gradients
    moved = {name: np.abs(once[name] - value).max() for name, value in without.items()}
    assert max(moved.values()) > 1e-3
    for name, value in without.items():
        np.testing.assert_allclose(twice[name] - value, 2 * (once[name] - value), rtol=1e-6, atol=1e-12, err_msg=name)
    weights = [name for name in moved if ".router." in name]
    assert all(moved[name] > 1e-5 for name in weights)


# ------------------------------------------------------------------ 7: blocks without experts


@pytest.mark.parametrize("moe", [{}, {"every": 2}, {"first_dense": 1}], ids=str)
def test_dense_blocks_have_no_part_in_the_losses(moe):
    """Losses add up over the layers with experts; reported is their mean over those, not over all blocks."""
    weights = {"load_balance": LoadBalanceConfig(coefficient=0.5), "router_z_loss": 0.25}
    config = model_config(moe=moe | weights, num_layers=4, output_z_loss=0.0)
    training = training_model(config, "float64")
    terms = training.accumulate(batch_of(training.model), 1.0)
    layers = len(config.moe_layers)
    assert terms.load_balance >= 0.9
    want = terms.cross_entropy + layers * (0.5 * terms.load_balance + 0.25 * terms.router_z)
    assert_close(float(terms.loss), float(want), 1e-13)


# ------------------------------------------------------------------ 8: imbalance that no option can stop


@pytest.mark.parametrize(
    "router", [SwitchConfig(), TopKConfig(), TopPConfig(), SigmoidBiasConfig()], ids=lambda config: config.name
)
def test_the_coefficient_of_the_config_stops_imbalance(router):
    """Descent on the auxiliary loss alone: tokens that all prefer one expert end up spread, without it they do not."""
    imbalance = {}
    for coefficient in (0.0, 1.0):
        layer = layer_of(router.name, coefficient=coefficient, router_z_loss=0.0)
        backend = TORCH.build()
        ops, x_TD = backend.ops, rng(9).standard_normal((TOKENS, WIDTH))
        x_TD[:, 0] = 1.0
        unbiased = {"router.bias": ops.zeros((EXPERTS,), "float64")}
        weight_ED = rng(10).standard_normal((EXPERTS, WIDTH)) / 4
        weight_ED[0, 0] = 2.0

        def loss(inputs, layer=layer, ops=ops, x_TD=x_TD, unbiased=unbiased):
            metrics = metrics_of(layer, ops, unbiased | inputs, ops.from_numpy(x_TD))
            return layer.auxiliary_loss(ops, metrics)

        for _ in range(200):
            _, grads = backend.value_and_grad(loss)({"router.weight": ops.from_numpy(weight_ED)})
            weight_ED = weight_ED - 2.0 * ops.to_numpy(grads["router.weight"])
        trained = {"router.weight": weight_ED, "router.bias": np.zeros(EXPERTS)}
        chosen_E = metrics_of(layer, params=trained, x_TD=x_TD).chosen_E
        imbalance[coefficient] = chosen_E.max() / chosen_E.mean()
    assert imbalance[0.0] > 1.8
    assert imbalance[1.0] < 1.4
