"""The bounds against scipy, the paper's numbers and a simulation."""

import math

import numpy as np
import pytest
from scipy import special

from moeport.core.bounds import (
    FORMS,
    arrival_probability,
    controller_bound,
    delta_max_bound,
    incomplete_beta,
    lower_bound,
    two_sided_probability,
)
from tests.support import rng


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.0, 3.0), (2.0, 5.0), (0.5, 2559.5), (511.5, 0.5), (30.0, 40.0)])
@pytest.mark.parametrize("x", [0.0, 1e-8, 9e-4, 0.02, 0.43, 0.5, 0.9, 0.9991, 1.0])
def test_incomplete_beta_is_that_of_scipy(a, b, x):
    assert incomplete_beta(a, b, x) == pytest.approx(float(special.betainc(a, b, x)), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("dim", [2, 3, 16, 128, 1024, 5120])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.03, 0.1, 0.35, 0.9, 1.0])
def test_probability_of_a_cosine_is_that_of_scipy(delta, dim):
    square = delta**2
    exact = float(special.betaincc(0.5, (dim - 1) / 2, square))
    assert two_sided_probability(delta, dim, "incomplete_beta") == pytest.approx(exact, rel=1e-9, abs=1e-300)
    limit = float(special.erfc(math.sqrt(square * dim / (2 - square))))
    assert two_sided_probability(delta, dim, "erfc") == pytest.approx(limit, rel=1e-12, abs=1e-300)


def test_the_numbers_of_the_papers_experiment():
    """d = 5120, 16 experts, delta "about 0.03": two tokens by the exact form and its limit, and a bound of 0.63."""
    bounds = [round(lower_bound(0.03, 5120, 16, form), 2) for form in FORMS]
    assert bounds == [1.96, 1.97, 0.63]


@pytest.mark.parametrize(("delta", "dim", "want"), [(0.1, 512, 5.3), (0.1, 1024, 93.0), (0.03, 1024, 0.37)])
def test_it_grows_with_the_width_and_may_say_nothing(delta, dim, want):
    assert lower_bound(delta, dim, 8) == pytest.approx(want, rel=0.02)


def test_the_exponential_form_is_below_the_erfc_form():
    for delta in np.linspace(0.0, 0.5, 11):
        assert lower_bound(delta, 256, 8, "exponential") <= lower_bound(delta, 256, 8, "erfc")


@pytest.mark.parametrize("experts", [2, 8, 16])
@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.5, 1.0])
def test_a_token_on_a_line_is_always_discriminative(delta, experts):
    assert lower_bound(delta, 1, experts) == 1 / experts


def test_a_cosine_below_zero_counts_as_zero():
    for form in FORMS:
        assert lower_bound(-0.3, 64, 8, form) == lower_bound(0.0, 64, 8, form) == pytest.approx(1 / 8)


def test_it_is_infinite_where_no_float_is_small_enough():
    assert lower_bound(1.0, 64, 8) == math.inf
    assert delta_max_bound(0.9, 10_000, 8) == math.inf


def test_success_takes_more_tokens_than_expectation():
    """ln(1 / eta) times as many; 1 - (1 - p)^C is then at least 1 - eta."""
    p = arrival_probability(0.1, 512, 8, "incomplete_beta", "exact")
    tokens = math.ceil(lower_bound(0.1, 512, 8, probability="exact", failure=0.05))
    assert tokens == math.ceil(math.log(20) / p)
    assert 1 - (1 - p) ** tokens >= 0.95


@pytest.mark.parametrize(("dim", "experts", "delta"), [(256, 8, 0.06), (256, 8, 0.12), (1024, 8, 0.05), (512, 16, 0.1)])
def test_isotropic_tokens_arrive_with_the_exact_probability(dim, experts, delta):
    """The theorem's own setting: orthogonal gates of one length, tokens uniform on the sphere."""
    random, tokens, found = rng(5), 20_000, 0
    gates_ED = np.linalg.qr(random.standard_normal((dim, experts)))[0].T
    for _ in range(5):
        x_TD = random.standard_normal((tokens, dim), np.float32)
        cosine_TE = x_TD @ gates_ED.T.astype(np.float32) / np.linalg.norm(x_TD, axis=1, keepdims=True)
        found += int((cosine_TE.max(1) >= delta).sum())
    exact = arrival_probability(delta, dim, experts, "incomplete_beta", "exact")
    assert found / (5 * tokens) == pytest.approx(exact, rel=0.05)
    assert arrival_probability(delta, dim, experts, "incomplete_beta", "paper") > 1.5 * exact


@pytest.mark.parametrize("experts", [4, 16])
def test_so_many_isotropic_tokens_hold_one_discriminative_one(experts):
    """The mean waiting time for a discriminative token is the bound 1 / p_i."""
    random, dim, delta = rng(6), 128, 0.25
    x_TD = random.standard_normal((200_000, dim), np.float32)
    cosine_TE = x_TD[:, :experts] / np.linalg.norm(x_TD, axis=1, keepdims=True)
    own_T = cosine_TE.argmax(1)
    waits = []
    for expert in range(experts):
        arrived = cosine_TE[own_T == expert, expert] >= delta
        waits.append(len(arrived) / arrived.sum())
    assert np.mean(waits) == pytest.approx(lower_bound(delta, dim, experts, probability="exact"), rel=0.05)


def test_experts_that_take_their_best_tokens_find_the_discriminative_one():
    """LocMoE+: with C >= 2 s q, it is among the best C with a probability of at least 1 - exp(-3 C / 16)."""
    random, tokens, q, trials = rng(7), 400, 0.03, 4000
    capacity = math.ceil(controller_bound((tokens - 1) * q))
    better = random.binomial(tokens - 1, q, trials)
    assert capacity == 24
    assert (better < capacity).mean() >= 1 - math.exp(-3 * capacity / 16)
    assert (better < capacity // 4).mean() < 0.1  # and with C <= s q / 2 it seldom is
