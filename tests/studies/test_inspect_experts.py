"""What `moeport inspect` says of the experts themselves, against direct, slow computations."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.special import betainc
from scipy.stats import pearsonr

from moeport.studies.inspect.components import components
from moeport.studies.inspect.counts import count
from moeport.studies.inspect.experts import NEURONS, cosines, likeness, match, matrices_of, off_diagonal
from moeport.studies.inspect.geometry import first_choices, geometry
from moeport.studies.inspect.inspect import bounds_of
from tests.studies.inspected import MODELS, Example

SAMPLE = 20


@pytest.fixture(params=["swiglu", "gelu"])
def example(tmp_path, request):
    return Example(tmp_path, MODELS["position"] | {"activation": request.param})


def cosine(a, b):
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def pairwise(items, function):
    """A value for each pair of items, in a matrix."""
    return [[function(a, b) for b in items] for a in items]


def test_weights_are_compared_as_a_loop_does(example):
    for layer in example.walk():
        found, weights = likeness(layer, SAMPLE), matrices_of(layer)
        for name, w in weights.items():
            flat = [each.astype(np.float64).ravel() for each in w]
            neurons = [(each.T if name in ("down", "out") else each).astype(np.float64).mean(0) for each in w]
            np.testing.assert_allclose(found.matrices[name], pairwise(flat, cosine), atol=1e-6)
            np.testing.assert_allclose(found.neurons[name], pairwise(neurons, cosine), atol=1e-6)
            rows = layer.params["router.weight"].astype(np.float64)
            pairs = list(combinations(range(layer.num_experts), 2))
            x, y = ([cosine(each[i], each[j]) for i, j in pairs] for each in (rows, neurons))
            assert found.gate_fit[name] == pytest.approx(pearsonr(x, y).statistic ** 2)


def test_components_are_those_of_scikit_learn(example):
    decomposition = pytest.importorskip("sklearn.decomposition")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    for layer in example.walk():
        found, weights = likeness(layer, SAMPLE), matrices_of(layer)
        assert found.components.keys() == weights.keys()
        for name, w in weights.items():
            flat = w.reshape(len(w), -1).astype(np.float64)
            pca = decomposition.PCA(2).fit(standard := preprocessing.StandardScaler().fit_transform(flat))
            expected_E2, each = pca.transform(standard), found.components[name]
            signs = np.sign((expected_E2 * each.place_E2).sum(0))
            np.testing.assert_allclose(each.place_E2, expected_E2 * signs, atol=1e-6)
            np.testing.assert_allclose(each.share_2, pca.explained_variance_ratio_, atol=1e-9)
            assert (each.place_E2.max(0) >= -each.place_E2.min(0)).all()


def test_components_take_the_memory_of_a_block_and_take_equal_experts(monkeypatch):
    w = np.random.default_rng(0).normal(size=(5, 12, 7)).astype(np.float32)
    w[:, 3] = w[0, 3]  # entries that all experts share
    whole = components(w)
    monkeypatch.setattr("moeport.studies.inspect.components.BLOCK", 70)
    blocks = components(w)
    np.testing.assert_allclose(blocks.place_E2, whole.place_E2, atol=1e-9)
    standard = (w - w.mean(0)) / np.where(w.std(0) > 0, w.std(0), 1)
    _, singular, _ = np.linalg.svd(standard.reshape(5, -1).astype(np.float64))
    np.testing.assert_allclose(blocks.share_2, (singular**2 / (singular**2).sum())[:2], rtol=1e-5)
    same = components(np.ones((3, 2, 2), np.float32))
    assert not same.place_E2.any()
    assert not same.share_2.any()


def test_matrices_are_those_of_the_layer(example):
    for layer in example.walk():
        weights = matrices_of(layer)
        inner = np.concatenate([weights[name] for name in weights if name in ("gate", "up", "in")], axis=1)
        assert np.array_equal(inner, layer.params["experts.w_in"])
        assert np.array_equal(weights.get("down", weights.get("out")), layer.params["experts.w_out"])


def test_neurons_are_matched_as_trying_all_permutations_does():
    first, second = np.random.default_rng(0).normal(size=(2, 5, 3))
    values = np.array(pairwise([*first, *second], cosine))[:5, 5:]
    best = max(permutations(range(5)), key=lambda order: sum(values[i, j] for i, j in enumerate(order)))
    concordant = [np.sign(best[j] - best[i]) for i, j in combinations(range(5), 2)]
    expected = values.diagonal().mean(), np.mean([values[i, j] for i, j in enumerate(best)]), np.mean(concordant)
    assert match(first, second) == pytest.approx(expected)


def test_shuffled_neurons_are_found_again():
    neurons = np.random.default_rng(0).normal(size=(20, 8))
    before, after, tau = match(neurons, neurons[::-1])
    assert (after, tau) == pytest.approx((1, -1))
    assert before < 0.5
    assert match(neurons, neurons) == pytest.approx((1, 1, 1))


def test_outputs_are_compared_as_a_loop_does(example):
    ops = example.backend.ops
    for layer in example.walk():
        found, activation = likeness(layer, SAMPLE), layer.moe.config.activation
        x_TD, score_TE = (
            np.concatenate([getattr(each, name) for each in layer.routed]) for name in ("x_TD", "probs_TE")
        )
        chosen = np.unique(np.linspace(0, len(x_TD) - 1, SAMPLE).astype(int))
        w_in, w_out = layer.params["experts.w_in"], layer.params["experts.w_out"]
        experts = range(layer.num_experts)
        similar, ranks = np.zeros((len(experts),) * 2), np.zeros((len(experts),) * 2, int)
        active = np.zeros(len(experts))
        for token in chosen:
            outputs = [ops.mlp(x_TD[token : token + 1], w_in[e], w_out[e], activation)[0] for e in experts]
            outputs = [y.astype(np.float64) for y in outputs]
            similar += pairwise(outputs, lambda a, b: 1 - math.acos(min(1, cosine(a, b))) / math.pi)
            by_norm = sorted(experts, key=lambda e: -np.linalg.norm(outputs[e]))
            by_score = sorted(experts, key=lambda e: -score_TE[token, e])
            for place, expert in enumerate(by_norm):
                ranks[place, by_score.index(expert)] += 1
            for e in experts:
                inner = w_in[e].astype(np.float64) @ x_TD[token]
                inner = inner[: len(inner) // 2] if activation == "swiglu" else inner
                half = [1 / (1 + math.exp(-z)) if activation == "swiglu" else math.erfc(-z / 2**0.5) / 2 for z in inner]
                active[e] += np.mean([abs(z * gate) > 0.001 for z, gate in zip(inner, half, strict=True)])
        np.testing.assert_allclose(found.outputs, similar / len(chosen), atol=1e-4)
        assert found.rank_EE.tolist() == ranks.tolist()
        assert found.rank_EE.sum(0).tolist() == [found.tokens] * len(experts) == [len(chosen)] * len(experts)
        np.testing.assert_allclose(found.active_E, active / len(chosen), atol=0.002)


def test_many_neurons_are_not_matched(tmp_path):
    few, many = (
        Example(tmp_path / str(width), MODELS["topk"] | {"expert_hidden": width}) for width in (8, NEURONS + 1)
    )
    assert {len(likeness(layer, 1).matched) for layer in few.walk()} == {3 * 6}
    assert {len(likeness(layer, 1).matched) for layer in many.walk()} == {0}


def test_cosines_of_zeros_are_zero():
    assert cosines(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0, 0], [0, pytest.approx(1)]]
    assert off_diagonal(np.array([[1.0, 0.2], [0.4, 1.0]])) == pytest.approx(0.3)
    assert math.isnan(off_diagonal(np.ones((1, 1))))


def test_without_first_choices_an_only_expert_gives_nothing(tmp_path):
    """With one expert per token, the loss is that of a model whose experts are all zero."""
    example = Example(tmp_path, {"router": {"name": "topk", "top_k": 1}})
    walk = example.walk(without_first_choice=True)
    assert all((each.expert_N == 4).all() for layer in walk for each in layer.routed)
    silent = {name: x * (0 if name.endswith("experts.w_out") else 1) for name, x in example.params.items()}
    model = example.backend.evaluation_model(example.lm, silent)
    expected = np.concatenate([model.token_losses(each.batch).ravel() for each in example.portions])
    np.testing.assert_allclose(walk.nats(), expected, rtol=1e-5)


def test_without_first_choices_the_second_ones_stay(tmp_path):
    example = Example(tmp_path, MODELS["topk"])
    with_all, without = (next(iter(example.walk(without_first_choice=taken))) for taken in (False, True))
    for a, b in zip(with_all.routed, without.routed, strict=True):
        assert (b.expert_N[::2] == with_all.num_experts).all()
        assert b.expert_N[1::2].tolist() == a.expert_N[1::2].tolist()
        assert b.served_N.tolist() == [False, True] * len(a.x_TD)


def test_bounds_are_those_of_the_papers_at_the_measured_cosines(tmp_path):
    """Theorem 1 with the probability of a spherical cap; remark 7."""
    example = Example(tmp_path, MODELS["position"])
    for layer in example.walk():
        shape, dim, experts = geometry(layer), layer.moe.d_model, layer.num_experts
        own = []
        for routed in layer.routed:
            tokens, first = first_choices(routed, experts)
            rows = layer.params["router.weight"][first]
            own += [cosine(x, row) for x, row in zip(routed.x_TD[tokens], rows, strict=True)]
        assert (shape.mean_cosine, shape.largest_cosine) == pytest.approx((np.mean(own), max(own)), abs=1e-5)
        found, square = bounds_of(layer, shape), max(own) ** 2
        assert found.locmoe_plus == pytest.approx(math.exp(dim * square / (2 - square)) / experts, rel=1e-3)
        cap = betainc((dim - 1) / 2, 0.5, 1 - max(0.0, np.mean(own)) ** 2)
        assert found.locmoe == pytest.approx(1 / (1 - (1 - cap / 2) ** experts), rel=1e-3)
        counts = count(layer, example.keys)
        loads = [np.bincount(each.expert_N, minlength=experts) for each in layer.routed]
        assert counts.busiest == tuple(load.max() for load in loads)
        assert counts.mean_load == pytest.approx(np.mean(loads))
