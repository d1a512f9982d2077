"""Causes of decisions that differ, on scores made for each."""

import numpy as np
import pytest

from moeport.parity.recording import TensorRecord
from moeport.parity.routing import compare_decision

LIMIT = 1e-3


def decision(values, op="topk_ids"):
    values = np.asarray(values)
    return TensorRecord("layers.0/moe.router:topk_ids", "decision", "int64", values.shape, 0, op, values=values)


def top(scores, k=2):
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def compared(scores_a, scores_b, chosen_b=None, k=2):
    chosen_a = top(scores_a, k)
    chosen_b = top(scores_b, k) if chosen_b is None else np.asarray(chosen_b)
    return compare_decision(decision(chosen_a), decision(chosen_b), None, scores_a, scores_b, LIMIT)


def test_equal_choices():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    found = compared(scores, scores)
    assert (found.agreement, found.near_ties, found.other_scores, found.unexplained) == (1.0, 0, 0, 0)
    assert found.flips == []
    assert (found.rows, found.choices) == (2, 4)


def test_a_near_tie():
    a = np.array([[3.0, 2.0, 1.9999]])
    b = np.array([[3.0, 1.9999, 2.0]])
    found = compared(a, b)
    assert (found.near_ties, found.other_scores, found.unexplained) == (1, 0, 0)
    (flip,) = found.flips
    assert (flip.row, flip.choice, flip.a, flip.b, flip.cause) == (0, 1, 1, 2, "near tie")
    assert flip.gap == pytest.approx(1e-4)
    assert flip.error == pytest.approx(2e-4)
    assert found.flipped_rows == [0]
    assert found.agreement == 0.5


def test_scores_that_differ():
    found = compared(np.array([[3.0, 2.0, 1.0]]), np.array([[3.0, 1.0, 2.0]]))
    assert (found.near_ties, found.other_scores, found.unexplained) == (0, 1, 0)


def test_a_tie_broken_the_other_way():
    scores = np.array([[2.0, 2.0, 1.0]])
    found = compared(scores, scores, chosen_b=[[1, 0]])
    assert (found.near_ties, found.other_scores, found.unexplained) == (0, 0, 2)
    assert [flip.gap for flip in found.flips] == [0.0, 0.0]


def test_choices_that_are_not_the_largest():
    scores = np.array([[3.0, 2.0, 1.0]])
    assert compared(scores, scores, chosen_b=[[0, 2]]).unexplained == 1


def test_scores_of_minus_infinity_are_no_near_tie():
    a, b = np.array([[3.0, 2.0, -np.inf]]), np.array([[3.0, -np.inf, 2.0]])
    assert compared(a, b).other_scores == 1


def test_a_condition_may_flip_for_a_few_entries_only():
    a = np.zeros((2000, 1), bool)
    for flips, near in ((1, 1), (2, 2), (3, 0)):
        b = a.copy()
        b[:flips] = True
        found = compare_decision(decision(a, "where"), decision(b, "where"), None, None, None, LIMIT)
        assert (found.near_ties, found.other_scores) == (near, flips - near)


def test_an_order_must_sort_its_scores():
    x = np.array([3.0, 1.0, 2.0, 1.0])
    for order, unexplained in (([0, 2, 1, 3], 0), ([0, 2, 3, 1], 2), ([2, 0, 1, 3], 2)):
        found = compare_decision(decision([0, 2, 1, 3], "argsort"), decision(order, "argsort"), None, x, x, LIMIT)
        assert found.unexplained == unexplained


def test_both_numbers_are_reported_for_a_replay():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    a = decision(top(scores))
    free, replayed = decision([[2, 1], [0, 1]]), decision([[0, 1], [0, 1]])
    found = compare_decision(a, free, replayed, scores, scores, LIMIT)
    assert (found.agreement, found.agreement_replayed) == (0.75, 1.0)
    assert found.flipped_rows == [0]
