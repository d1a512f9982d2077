import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance.formulas import softmax
from moeport.core.losses import load_balance_loss
from moeport.core.parameters import ParameterSpec
from moeport.routers import build_router
from moeport.routers.adamoe import AdaMoEConfig
from tests.routers.examples import EXPERTS, choices, logits_as_tokens, route
from tests.support import assert_close, rng

VARIANTS = [AdaMoEConfig(), AdaMoEConfig(top_k=1), AdaMoEConfig(top_k=EXPERTS, null_experts=1)]
"""Further configs for the tests of all routers."""


def routed(logits_TE, nulls, **options):
    logits_TE = np.asarray(logits_TE, np.float64)
    config = AdaMoEConfig(null_experts=nulls, **options)
    return route(config, *logits_as_tokens(logits_TE), num_experts=logits_TE.shape[1] - nulls)


def test_gates_are_normalised_over_the_true_experts_among_the_choices():
    probs = np.array([[0.4, 0.1, 0.3, 0.15, 0.05], [0.1, 0.2, 0.05, 0.4, 0.25], [0.01, 0.02, 0.07, 0.4, 0.5]])
    experts, gates = choices(routed(np.log(probs), nulls=2, top_k=3))
    assert experts.tolist() == [[0, 2, 3], [3, 3, 1], [3, 3, 2]]
    assert_close(gates, [[4 / 7, 3 / 7, 0], [0, 0, 1], [0, 0, 1]], 1e-14)


def test_a_token_with_null_experts_alone_gets_nothing():
    experts, gates = choices(routed([[0, 0, 0, 5, 6]], nulls=2, top_k=2))
    assert experts.tolist() == [[3, 3]]
    assert gates.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("nulls", "k", "table_7"), [(5, 4, 1.78), (7, 4, 1.45), (9, 4, 1.23)])
def test_experts_used_at_balance_are_those_of_the_papers_table_7(nulls, k, table_7):
    """Logits without preference: a token uses k n / (n + m) true experts on average, here n = 4."""
    tokens, n = 20_000, 4
    experts, _ = choices(routed(rng(5).standard_normal((tokens, n + nulls)), nulls, top_k=k))
    used = (experts < n).sum(axis=1)
    assert abs(used.mean() - k * n / (n + nulls)) < 4 * used.std() / np.sqrt(tokens)
    assert round(k * n / (n + nulls), 2) == table_7


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balance_loss_is_equation_6_over_k(k):
    """l = (n + m) * sum of f~_i P_i, where f~_i of a null expert is the mean f of the null experts."""
    logits, n, m = rng(6).standard_normal((40, 7)) + np.linspace(-1, 1, 7), 4, 3
    probs = np.array([softmax(row) for row in logits])
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    f = np.array([(chosen == i).any(axis=1).mean() for i in range(n + m)])
    averaged = np.concatenate([f[:n], np.full(m, f[n:].mean())])
    want = (n + m) * np.sum(averaged * probs.mean(axis=0)) / k
    assert np.abs(averaged - f).max() > 0.01
    assert_close(load_balance_loss(NumpyOps(), routed(logits, m, top_k=k), 1), want, 1e-14)


def test_the_balance_loss_does_not_see_how_tokens_spread_over_the_null_experts():
    logits = rng(7).standard_normal((30, 6))
    swapped = logits.copy()
    swapped[::2, 4:] = logits[::2, :3:-1]
    losses = [load_balance_loss(NumpyOps(), routed(z, nulls=2, top_k=3), 1) for z in (logits, swapped)]
    assert not np.array_equal(logits, swapped)
    assert_close(losses[0], losses[1], 1e-14)


def test_perfect_balance_is_one():
    logits = np.log(1 + np.eye(6)[np.arange(12) % 6])
    assert_close(load_balance_loss(NumpyOps(), routed(logits, nulls=2, top_k=1), 1), 1.0, 1e-14)


def test_null_experts_have_rows_of_the_weight():
    router = build_router(AdaMoEConfig(null_experts=3), d_model=5, num_experts=4, init_std=0.5)
    assert router.parameter_specs() == [ParameterSpec("weight", (7, 5), std=0.5)]


def test_more_choices_than_experts_are_a_problem():
    assert AdaMoEConfig(top_k=4).problems(4) == []
    assert AdaMoEConfig().problems(2) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (2)")
    ]
