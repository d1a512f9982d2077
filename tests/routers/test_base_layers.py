import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.routers.base_layers import BaseLayersConfig, balanced_assignment
from tests.conformance.targets import every_target
from tests.routers.examples import choices, logits_as_tokens, route
from tests.support import assert_close, rng

GAP = {"plain": 0.02, "skewed": 0.02, "clusters": 0.05, "repeated": 0.1}
"""Largest share of what the best assignment has over a blind one that ours may lack, at 8 tokens an expert or more."""


def scores(kind, tokens, experts, seed=0):
    """Affinities of tokens without structure, with a common direction, in few clusters, or equal in groups of 8."""
    random = rng(seed)
    x, centroids = random.standard_normal((tokens, 32)), random.standard_normal((experts, 32))
    match kind:
        case "skewed":
            x += 3 * random.standard_normal(32)
        case "clusters":
            x = 0.1 * x + 2 * random.standard_normal((4, 32))[random.integers(0, 4, tokens)]
        case "repeated":
            x = np.repeat(x, 8, axis=0)[:tokens]
    return x @ centroids.T


def places(tokens, experts):
    """Tokens that each expert gets."""
    return [tokens // experts + (expert < tokens % experts) for expert in range(experts)]


every_kind = pytest.mark.parametrize("kind", ["plain", "skewed", "clusters", "repeated"])


@every_kind
@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (5, 8), (8, 8), (12, 8), (100, 7), (256, 64), (3, 1)])
def test_the_load_is_balanced_exactly(kind, tokens, experts):
    expert_T = balanced_assignment(NumpyOps(), scores(kind, tokens, experts))
    assert np.bincount(np.asarray(expert_T), minlength=experts).tolist() == places(tokens, experts)


@pytest.mark.parametrize("score", [0.0, 1e30, -1e-30])
def test_the_load_is_balanced_where_all_scores_are_equal(score):
    expert_T = balanced_assignment(NumpyOps(), np.full((30, 4), score))
    assert np.bincount(np.asarray(expert_T), minlength=4).tolist() == [8, 8, 7, 7]


@every_kind
@pytest.mark.parametrize(("tokens", "experts"), [(100, 7), (512, 16), (512, 64), (1024, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_assignment_is_near_the_best(kind, tokens, experts, seed):
    optimize = pytest.importorskip("scipy.optimize")
    scores_TE = scores(kind, tokens, experts, seed)
    by_place = np.repeat(scores_TE, places(tokens, experts), axis=1)
    best = by_place[optimize.linear_sum_assignment(by_place, maximize=True)].sum()
    got = scores_TE[np.arange(tokens), balanced_assignment(NumpyOps(), scores_TE)].sum()
    blind = scores_TE.mean(axis=1).sum()
    assert best - got + 1e-9 >= 0
    assert best - got <= GAP[kind] * (best - blind)


def test_an_assignment_that_greedy_choice_balances_is_that_choice():
    scores_TE = rng(3).standard_normal((64, 8)) + 6 * np.eye(8)[np.arange(64) % 8]
    assert np.asarray(balanced_assignment(NumpyOps(), scores_TE)).tolist() == (np.arange(64) % 8).tolist()


def test_scale_and_offset_of_the_scores_do_not_matter():
    scores_TE = scores("plain", 64, 8)
    want = np.asarray(balanced_assignment(NumpyOps(), scores_TE)).tolist()
    for changed in (1000 * scores_TE, 0.001 * scores_TE, scores_TE + 5, scores_TE + rng(1).standard_normal((64, 1))):
        assert np.asarray(balanced_assignment(NumpyOps(), changed)).tolist() == want


@every_target
@every_kind
def test_every_backend_balances(target, kind):
    ops = target.build().ops
    dtype = "float64" if target.dtype == "float64" else "float32"
    scores_TE = scores(kind, 100, 7)
    got = ops.to_numpy(balanced_assignment(ops, ops.cast(ops.from_numpy(scores_TE), dtype)))
    assert np.bincount(got, minlength=7).tolist() == places(100, 7)
    if dtype == "float64" and kind != "repeated":
        assert np.asarray(got).tolist() == np.asarray(balanced_assignment(NumpyOps(), scores_TE)).tolist()


def test_training_assigns_and_evaluation_is_greedy_with_the_sigmoid_of_the_score_as_gate():
    logits_TE = scores("skewed", 64, 8) / 8
    for training in (True, False):
        experts, gates = choices(route(BaseLayersConfig(), *logits_as_tokens(logits_TE), training, num_experts=8))
        want = balanced_assignment(NumpyOps(), logits_TE) if training else logits_TE.argmax(axis=1)
        assert experts[:, 0].tolist() == want.tolist()
        assert_close(gates[:, 0], 1 / (1 + np.exp(-logits_TE[np.arange(64), experts[:, 0]])), 1e-14)
    assert np.bincount(logits_TE.argmax(axis=1), minlength=8).max() > 16


def test_the_residual_connection_makes_the_output_that_of_the_paper():
    """a f(x) + (1 - a) x with f(x) = x + FFN(x) is x plus the gate times FFN(x), what a block makes of this router."""
    x, ffn, gate = rng(1).standard_normal((5, 3)), rng(2).standard_normal((5, 3)), rng(3).random((5, 1))
    assert_close(x + gate * ffn, gate * (x + ffn) + (1 - gate) * x, 1e-14)
