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
    rivals_bound,
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


@pytest.mark.parametrize("probability", ["paper", "independent"])
@pytest.mark.parametrize("failure", [0.3, 0.05, 0.001])
@pytest.mark.parametrize(("delta", "dim", "experts"), [(0.1, 512, 8), (0.3, 64, 16), (0.8, 4, 4), (0.75, 2, 2)])
def test_success_takes_the_tokens_after_which_none_has_arrived_with_that_probability(
    delta, dim, experts, failure, probability
):
    p = arrival_probability(delta, dim, experts, "incomplete_beta", probability)
    tokens = math.ceil(lower_bound(delta, dim, experts, probability=probability, failure=failure))
    assert (1 - p) ** tokens <= failure
    assert tokens == 1 or (1 - p) ** (tokens - 1) > failure
    assert tokens <= math.ceil(math.log(1 / failure) / p)


def test_a_token_that_always_arrives_is_enough():
    assert lower_bound(0.0, 64, 8, probability="paper", failure=0.01) == 1.0
    assert lower_bound(0.0, 1, 8, probability="independent", failure=0.01) == 1.0
    assert lower_bound(0.9, 1, 8, probability="independent", failure=0.01) == 1.0


def isotropic_cosines(random, dim, experts, tokens):
    """The theorem's own setting: cosines of tokens that are uniform on the sphere and gates that are orthogonal.

    In a basis that begins with the gates, what the other coordinates add to the length is a chi-square.
    """
    x_TE = random.standard_normal((tokens, experts), np.float32)
    others_T = random.chisquare(dim - experts, tokens) if dim > experts else np.zeros(tokens)
    return x_TE / np.sqrt((x_TE**2).sum(1) + others_T)[:, None]


def share_of_discriminative(dim, experts, delta, tokens=200_000):
    return (isotropic_cosines(rng(5), dim, experts, tokens).max(1) >= delta).mean()


def test_the_simulation_is_that_of_whole_vectors():
    random, dim, experts = rng(13), 64, 8
    gates_ED = np.linalg.qr(random.standard_normal((dim, experts)))[0].T
    x_TD = random.standard_normal((50_000, dim))
    whole_T = (x_TD @ gates_ED.T / np.linalg.norm(x_TD, axis=1, keepdims=True)).max(1)
    parts_T = isotropic_cosines(random, dim, experts, 50_000).max(1)
    quantiles = (0.1, 0.5, 0.9, 0.99)
    assert np.quantile(parts_T, quantiles) == pytest.approx(np.quantile(whole_T, quantiles), rel=0.02)


@pytest.mark.parametrize(("dim", "experts", "delta"), [(256, 8, 0.06), (256, 8, 0.12), (1024, 8, 0.05), (512, 16, 0.1)])
def test_isotropic_tokens_arrive_as_if_cosines_were_independent(dim, experts, delta):
    """In hundreds of dimensions."""
    independent = arrival_probability(delta, dim, experts, "incomplete_beta", "independent")
    assert share_of_discriminative(dim, experts, delta) == pytest.approx(independent, rel=0.05)
    assert arrival_probability(delta, dim, experts, "incomplete_beta", "paper") > 1.5 * independent


@pytest.mark.parametrize(("dim", "experts", "delta", "ratio"), [(4, 4, 0.6, 1.15), (16, 8, 0.375, 1.06)])
def test_in_few_dimensions_more_arrive(dim, experts, delta, ratio):
    """The squares of a token's cosines sum to at most 1, so that large ones seldom come together."""
    independent = arrival_probability(delta, dim, experts, "incomplete_beta", "independent")
    assert share_of_discriminative(dim, experts, delta) / independent == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize(
    ("dim", "experts", "delta"), [(2, 2, 0.71), (4, 4, 0.71), (4, 4, 0.75), (6, 5, 0.72), (4, 3, 0.9)]
)
def test_a_cosine_beyond_half_a_square_excludes_all_others(dim, experts, delta):
    """n p / 2 is exact there; independence would be up to 15% too small."""
    exact = arrival_probability(delta, dim, experts, "incomplete_beta", "independent")
    assert exact == pytest.approx(experts * two_sided_probability(delta, dim, "incomplete_beta") / 2)
    assert share_of_discriminative(dim, experts, delta) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    ("dim", "experts", "delta", "failure"), [(128, 8, 0.15, 0.05), (64, 16, 0.3, 0.2), (4, 4, 0.8, 0.1)]
)
def test_the_success_form_brings_a_discriminative_token_to_an_expert(dim, experts, delta, failure):
    """The success form against a simulation: of as many tokens as expert 0 takes, one at least is discriminative."""
    random = rng(8)
    capacity = math.ceil(lower_bound(delta, dim, experts, probability="independent", failure=failure))
    cosine_TE = isotropic_cosines(random, dim, experts, 400_000)
    own_T = cosine_TE[cosine_TE.argmax(1) == 0, 0]

    def success(tokens):
        trials = len(own_T) // tokens
        return (own_T[: trials * tokens].reshape(trials, tokens) >= delta).any(1).mean()

    assert success(capacity) >= 1 - failure - 0.015
    assert success(max(1, capacity // 2)) < 1 - failure - 0.015


@pytest.mark.parametrize("experts", [4, 16])
def test_so_many_isotropic_tokens_hold_one_discriminative_one(experts):
    """The mean waiting time for a discriminative token is the bound 1 / p_i."""
    random, dim, delta = rng(6), 128, 0.25
    cosine_TE = isotropic_cosines(random, dim, experts, 200_000)
    own_T = cosine_TE.argmax(1)
    waits = []
    for expert in range(experts):
        arrived = cosine_TE[own_T == expert, expert] >= delta
        waits.append(len(arrived) / arrived.sum())
    assert np.mean(waits) == pytest.approx(lower_bound(delta, dim, experts, probability="independent"), rel=0.05)


def test_experts_that_take_their_best_tokens_find_the_discriminative_one():
    """LocMoE+: with C >= 2 s q, it is among the best C with a probability of at least 1 - exp(-3 C / 16)."""
    random, tokens, q, trials = rng(7), 400, 0.03, 4000
    capacity = math.ceil(controller_bound((tokens - 1) * q))
    better = random.binomial(tokens - 1, q, trials)
    assert capacity == 24
    assert (better < capacity).mean() >= 1 - math.exp(-3 * capacity / 16)
    assert (better < capacity // 4).mean() < 0.1  # and with C <= s q / 2 it seldom is


def test_experts_that_take_their_best_tokens_keep_all_that_they_are_to_keep():
    """Exactly as many as there are own tokens and rivals above delta, in whatever order."""
    random = rng(12)
    own, others = random.normal(0.5, 0.2, 300), random.normal(0.1, 0.3, 700)
    delta = np.sort(own)[30]
    capacity = rivals_bound(float((own >= delta).sum()), float((others >= delta).sum()))
    best = np.sort(np.concatenate([own, others]))[::-1][: int(capacity)]
    assert best[-1] == delta
    assert np.isin(np.sort(own)[30:], best).all()
