"""V-MoE's noise and rounded capacities, against the formulas of its released code."""

import math

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance import formulas
from moeport.core.parameters import noise_rows
from moeport.core.routing import RouterContext
from moeport.routers.expert_choice import ExpertChoiceConfig
from moeport.routers.sinkhorn import SinkhornTokenChoiceConfig
from moeport.routers.topk import TopKConfig
from tests.model.models import model_and_params, model_config
from tests.routers.examples import EXPERTS, TOKENS, build, choices, context, hidden_states, router_params
from tests.support import assert_close, rng

VARIANTS = [
    TopKConfig(noise_std=1.0, normalize_gates=False),
    ExpertChoiceConfig(noise_std=1.0, multiple_of=4),
]
"""Further configs for the tests of all routers."""


def noisy_softmax(config, params, its_context):
    """softmax(x W + noise_std / E * n), n normal, of every token."""
    normal_TE = np.stack([its_context.noise[f"normal_logit_{e}"] for e in range(EXPERTS)], axis=1)
    logits_TE = hidden_states() @ params["weight"].T + config.noise_std / EXPERTS * normal_TE
    return np.array([formulas.softmax(logits) for logits in logits_TE])


def test_token_choice_of_vmoe_takes_and_weighs_by_the_noisy_softmax():
    config = TopKConfig(noise_std=8.0, normalize_gates=False)
    router = build(config)
    params, its_context = router_params(router), context(router)
    probs_TE = noisy_softmax(config, params, its_context)
    routing = router.route(NumpyOps(), params, hidden_states(), its_context)
    experts, gates = choices(routing)
    assert experts.tolist() == np.argsort(-probs_TE, axis=1)[:, :2].tolist()
    assert_close(gates, np.take_along_axis(probs_TE, experts, axis=1), 1e-14)
    assert_close(routing.probs_TE, probs_TE, 1e-14)


def test_without_training_there_is_no_noise():
    noisy, plain = (build(TopKConfig(noise_std=std)) for std in (8.0, 0.0))
    params = router_params(noisy)
    a, b = (r.route(NumpyOps(), params, hidden_states(), context(r, training=False)) for r in (noisy, plain))
    assert a.weight_N.tolist() == b.weight_N.tolist()
    assert plain.noise == ()


@pytest.mark.parametrize("multiple_of", [1, 4, 16])
def test_expert_choice_of_vmoe_takes_the_best_of_the_noisy_softmax(multiple_of):
    config = ExpertChoiceConfig(mean_experts=2.0, group="batch", noise_std=4.0, multiple_of=multiple_of)
    router = build(config)
    params, its_context = router_params(router), context(router)
    probs_TE = noisy_softmax(config, params, its_context)
    capacity = math.ceil(2.0 * TOKENS / EXPERTS)
    capacity = min(capacity + (-capacity) % multiple_of, TOKENS)
    routing = router.route(NumpyOps(), params, hidden_states(), its_context)
    got = set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
    assert got == {(int(t), e) for e in range(EXPERTS) for t in np.argsort(-probs_TE[:, e])[:capacity]}
    assert len(routing.expert_N) == config.assignments(TOKENS, EXPERTS, 1) == EXPERTS * capacity
    assert_close(routing.weight_N, probs_TE[routing.token_N, routing.expert_N], 1e-14)


def test_noise_is_normal_and_that_of_other_names_is_uniform():
    drawn = noise_rows("2.normal_logit_3", range(400), 100, 7, "noise", 1)
    assert drawn.dtype == np.float32
    sample = np.sort(drawn.reshape(-1).astype(np.float64))
    expected = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in sample])
    places = (np.arange(len(sample)) + 0.5) / len(sample)
    assert np.abs(expected - places).max() < 1.63 / math.sqrt(len(sample))  # Kolmogorov and Smirnov, 1%
    uniform = noise_rows("drop_0", range(400), 100, 7, "noise", 1)
    assert 0 <= uniform.min() < uniform.max() < 1


def test_ranks_draw_their_own_rows_of_the_noise():
    whole = noise_rows("normal_logit_0", range(6), 5, 7, "noise", 1)
    parts = [noise_rows("normal_logit_0", range(start, start + 2), 5, 7, "noise", 1) for start in (0, 2, 4)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    other = noise_rows("normal_logit_1", range(6), 5, 7, "noise", 1)
    assert abs(np.corrcoef(whole.reshape(-1), other.reshape(-1))[0, 1]) < 0.9


def test_a_model_draws_noise_for_every_layer_and_expert():
    config = model_config(moe={"router": TopKConfig(noise_std=1.0)})
    model, _ = model_and_params(config)
    noise = model.noise(2, 5, seed=0, step=3)
    assert sorted(noise) == sorted(f"{layer}.normal_logit_{e}" for layer in (0, 1) for e in range(4))
    assert any((values < 0).any() for values in noise.values())
    assert len({values.tobytes() for values in noise.values()}) == len(noise)


def test_sinkhorn_plans_from_the_noisy_logits():
    config = SinkhornTokenChoiceConfig(noise_std=8.0)
    router = build(config)
    params, its_context = router_params(router), context(router)
    routing = router.route(NumpyOps(), params, hidden_states(), its_context)
    assert_close(routing.probs_TE, noisy_softmax(config, params, its_context), 1e-14)


def test_a_layer_of_torch_draws_normal_noise():
    torch = pytest.importorskip("torch")
    from moeport.torch import MoE

    torch.manual_seed(0)
    layer = MoE(16, num_experts=4, expert_hidden=8, router={"name": "topk", "noise_std": 400.0})
    x = torch.from_numpy(rng(1).standard_normal((2000, 16))).float()
    first, second = layer(x), layer(x)
    assert (first != second).any()
    layer.eval()
    assert (layer(x) == layer(x)).all()


def test_a_context_without_noise_is_one_outside_training():
    router = build(TopKConfig(noise_std=1.0))
    assert (
        router.route(NumpyOps(), router_params(router), hidden_states(), RouterContext(0, False)).num_tokens == TOKENS
    )
