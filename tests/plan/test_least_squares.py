"""Non-negative least squares against conditions that only the least has, and against all subsets of free entries."""

from itertools import product

import numpy as np
import pytest

from moeport.plan.fit import non_negative_least_squares
from tests.support import rng


def problem(seed):
    """Terms of very different sizes, some of them 0, and what is wanted, with noise."""
    random = rng(seed)
    samples, terms = random.integers(1, 20), random.integers(1, 7)
    terms_SF = np.abs(random.standard_normal((samples, terms))) * 10.0 ** random.uniform(-9, 9, terms)
    terms_SF[:, random.random(terms) < 0.15] = 0.0
    true_F = np.maximum(random.standard_normal(terms), 0) / np.maximum(terms_SF.max(0), 1e-300)
    return terms_SF, terms_SF @ true_F * (1 + 0.1 * random.standard_normal(samples)) - 0.1 * random.random()


def squared(terms_SF, x_F, wanted_S):
    return float(np.square(terms_SF @ x_F - wanted_S).sum())


@pytest.mark.parametrize("seed", range(40))
def test_it_meets_the_conditions_of_karush_kuhn_and_tucker(seed):
    """No entry is negative, no gradient is, and one of the two is 0: so it is least, as the problem is convex."""
    terms_SF, wanted_S = problem(seed)
    x_F = non_negative_least_squares(terms_SF, wanted_S)
    scale_F = np.linalg.norm(terms_SF, axis=0) * max(1.0, float(np.linalg.norm(wanted_S)))
    gradient_F = terms_SF.T @ (terms_SF @ x_F - wanted_S) / np.where(scale_F > 0, scale_F, 1.0)
    assert (x_F >= 0).all()
    assert (gradient_F >= -1e-10).all()
    assert np.abs(gradient_F[x_F > 0]).max(initial=0.0) < 1e-10
    assert (x_F[scale_F == 0] == 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_of_free_entries_is_nearer(seed):
    terms_SF, wanted_S = problem(seed)
    size_F = np.linalg.norm(terms_SF, axis=0)
    scaled_SF = terms_SF / np.where(size_F > 0, size_F, 1.0)
    least = squared(terms_SF, np.zeros(len(size_F)), wanted_S)
    for chosen in product((False, True), repeat=len(size_F)):
        free = np.array(chosen) & (size_F > 0)
        x_F = np.zeros(len(size_F))
        x_F[free] = np.linalg.lstsq(scaled_SF[:, free], wanted_S, rcond=None)[0]
        if (x_F >= 0).all():
            least = min(least, squared(scaled_SF, x_F, wanted_S))
    found = squared(terms_SF, non_negative_least_squares(terms_SF, wanted_S), wanted_S)
    assert found == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("terms", "wanted", "expected"),
    [
        ([[1.0, 2.0, 4.0]], [8.0], [0.0, 0.0, 2.0]),  # one sample: the last entry alone
        ([[3.0, 1.0], [6.0, 2.0], [9.0, 3.0]], [3.0, 6.0, 9.0], [0.0, 3.0]),  # parallel terms
        ([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [2.0, 3.0], [0.0, 2.0, 3.0]),  # the first is the sum of the others
        ([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [2.0, 2.0], [0.0, 2.0, 2.0]),  # although alone it would do
        ([[1.0, 2.0]], [-1.0], [0.0, 0.0]),
        ([[0.0, 0.0]], [1.0], [0.0, 0.0]),
    ],
)
def test_of_equal_solutions_the_first_entries_are_0(terms, wanted, expected):
    assert non_negative_least_squares(np.array(terms), np.array(wanted)) == pytest.approx(np.array(expected))
