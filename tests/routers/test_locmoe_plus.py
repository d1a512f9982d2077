import math

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.drop import drop_overflow
from moeport.routers import build_router
from moeport.routers.locmoe_plus import LocMoEPlusConfig
from tests.routers.examples import EXPERTS, TOKENS, WIDTH, choices, hidden_states, route
from tests.routers.test_locmoe import gate_rows
from tests.support import assert_close, rng

VARIANTS = [
    LocMoEPlusConfig(nodes=4, locality_coefficient=0.5),
    LocMoEPlusConfig(top_k=4, threshold=0.6, gates="normalized", nodes=2),
    LocMoEPlusConfig(top_k=3, threshold=0.3, temperature=2.0, gates="cosine", nodes=5),
]
"""Further configs for the tests of all routers."""


def expected(config, x_TD):
    """(experts served, gates, cosines) of every token, by loops."""
    rows = gate_rows()
    for x in x_TD:
        cosines = rows @ x / (np.linalg.norm(rows, axis=1) * np.linalg.norm(x))
        shares = np.exp(cosines * math.sqrt(WIDTH) / config.temperature)
        shares /= shares.sum()
        served, total = [], 0.0
        for expert in sorted(range(EXPERTS), key=lambda e: -cosines[e])[: config.top_k]:
            if total < config.threshold:
                served.append(expert)
            total += shares[expert]
        gates = {"softmax": shares, "normalized": shares / shares[served].sum(), "cosine": cosines}[config.gates]
        yield served, gates[served], cosines


@pytest.mark.parametrize("gates", ["softmax", "normalized", "cosine"])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_choices_and_gates_are_those_of_a_loop(gates, threshold, top_k):
    config = LocMoEPlusConfig(gates=gates, threshold=threshold, top_k=top_k, temperature=0.8)
    routing = route(config)
    experts, weights = choices(routing)
    affinities = routing.affinity_N.reshape(TOKENS, top_k)
    for token, (served, want, cosines) in enumerate(expected(config, hidden_states())):
        assert experts[token].tolist() == served + [EXPERTS] * (top_k - len(served))
        assert_close(weights[token, : len(served)], want, 1e-12)
        assert_close(affinities[token, : len(served)], cosines[served], 1e-12)


def test_cosines_are_between_minus_one_and_one():
    """Tokens along a gate row, against it, across all, and at random."""
    rows = gate_rows()
    x_TD = np.concatenate([rows, -rows, rng(1).standard_normal((200, WIDTH)) * 1000, np.zeros((1, WIDTH))])
    router = build_router(LocMoEPlusConfig(), WIDTH, EXPERTS)
    cosines = np.asarray(router.gate_cosines(NumpyOps(), {}, x_TD))
    assert np.abs(cosines).max() <= 1 + 1e-15
    assert_close(cosines[:EXPERTS], np.eye(EXPERTS), 1e-11)
    assert_close(cosines[EXPERTS : 2 * EXPERTS], -np.eye(EXPERTS), 1e-11)
    assert cosines[-1].tolist() == [0.0] * EXPERTS


def test_a_threshold_of_one_takes_all_that_are_allowed_and_a_small_one_the_best():
    isotropic = rng(2).standard_normal((500, WIDTH))
    for threshold, used in ((1e-6, 1), (1.0, 3)):
        experts, _ = choices(route(LocMoEPlusConfig(top_k=3, threshold=threshold), x_TD=isotropic))
        assert ((experts < EXPERTS).sum(axis=1) == used).all()


def test_lengths_do_not_matter():
    want = route(LocMoEPlusConfig())
    got = route(LocMoEPlusConfig(), x_TD=hidden_states() * rng(3).uniform(0.1, 10, (TOKENS, 1)))
    assert got.expert_N.tolist() == want.expert_N.tolist()
    assert_close(got.weight_N, want.weight_N, 1e-10)


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_each_expert_then_keeps_the_nearest_of_the_tokens_that_chose_it(capacity):
    """Token choice, then expert choice: section 3 of the paper, by loops."""
    config = LocMoEPlusConfig(top_k=2, threshold=1.0)
    chosen = route(config, x_TD=hidden_states(tokens=60))
    routing = drop_overflow(NumpyOps(), chosen, capacity, "affinity")
    wanted = {expert: [] for expert in range(EXPERTS)}
    for token, (served, _, cosines) in enumerate(expected(config, hidden_states(tokens=60))):
        for expert in served:
            wanted[expert].append((-cosines[expert], token))
    experts, _ = choices(routing)
    for expert, tokens in wanted.items():
        assert len(tokens) > capacity
        kept = [token for _, token in sorted(tokens)[:capacity]]
        assert np.flatnonzero((experts == expert).any(axis=1)).tolist() == sorted(kept)


def test_it_trains_nothing():
    assert build_router(LocMoEPlusConfig(), WIDTH, EXPERTS).parameter_specs() == []
    assert LocMoEPlusConfig().parameter_count(WIDTH, EXPERTS) == 0


def test_more_choices_than_experts_are_a_problem():
    assert LocMoEPlusConfig(top_k=4).problems(4) == []
    assert LocMoEPlusConfig(top_k=5).problems(4) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (4)")
    ]
