import numpy as np
import pytest

from moeport.conformance.formulas import softmax
from moeport.routers.topk import TopKConfig
from tests.routers.examples import EXPERTS, choices, logits_as_tokens, route
from tests.support import assert_close

VARIANTS = [
    TopKConfig(top_k=3, normalize_gates=False),
    TopKConfig(top_k=3, softmax="after"),
    TopKConfig(top_k=1),
    TopKConfig(top_k=EXPERTS),
    TopKConfig(top_k=3, num_groups=4, top_groups=2, normalize_gates=False),
    TopKConfig(top_k=3, num_groups=2, softmax="after"),
]
"""Further configs for the tests of all routers."""
LOGITS = np.array([[0.5, 2.0, 1.0, -1.0], [1.0, 1.0, -3.0, 1.0]])


def routed(**options):
    return choices(route(TopKConfig(**options), *logits_as_tokens(LOGITS), num_experts=4))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_experts_come_best_first(k):
    experts, _ = routed(top_k=k)
    assert experts.tolist() == [[1, 2, 0, 3][:k], [0, 1, 3, 2][:k]]


@pytest.mark.parametrize("k", [1, 2])
def test_the_choice_stays_inside_the_group_with_the_best_expert(k):
    experts, gates = routed(top_k=k, num_groups=2, normalize_gates=False)
    assert experts.tolist() == [[1, 0][:k], [0, 1][:k]]
    assert_close(gates, [softmax(LOGITS[0])[[1, 0][:k]], softmax(LOGITS[1])[[0, 1][:k]]], 1e-15)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_normalised_gates_sum_to_one(k):
    _, gates = routed(top_k=k)
    assert_close(gates.sum(axis=1), [1.0, 1.0], 1e-15)


def test_gates_without_normalisation_are_probabilities():
    _, gates = routed(top_k=2, normalize_gates=False)
    assert_close(gates, [softmax(LOGITS[0])[[1, 2]], softmax(LOGITS[1])[[0, 1]]], 1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_softmax_after_equals_softmax_before_and_normalised(k):
    after, before = routed(top_k=k, softmax="after"), routed(top_k=k, softmax="before", normalize_gates=True)
    assert after[0].tolist() == before[0].tolist()
    assert_close(after[1], before[1], 1e-15)


def test_all_experts_without_normalisation_sum_to_one():
    _, gates = routed(top_k=4, normalize_gates=False)
    assert_close(gates.sum(axis=1), [1.0, 1.0], 1e-15)


def test_the_balance_loss_counts_every_choice():
    assert route(TopKConfig(top_k=3)).balanced_choices == 3


@pytest.mark.parametrize("k", [1, 4])
def test_as_many_choices_as_experts_are_allowed(k):
    assert TopKConfig(top_k=k).problems(4) == []


def test_more_choices_than_experts_are_a_problem():
    assert TopKConfig(top_k=5).problems(4) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (4)")
    ]
