"""What LocMoE+'s estimates say of tokens whose distribution is known, and whether experts of that capacity succeed."""

import math

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.capacity_rules import MOST_GIVEN_UP
from moeport.config.model import CapacityConfig
from moeport.core.bounds import arrival_probability, two_sided_probability
from moeport.model.capacity import affinity_statistics, counted_tokens, estimate_from, estimated_rows
from tests.core.routings import routing_of
from tests.support import rng

RIVALS = CapacityConfig(policy="locmoe_plus")
MINIMUM = CapacityConfig(policy="locmoe_plus", delta="minimum")
CONTROLLER = CapacityConfig(policy="locmoe_plus", rule="controller")
TOKENS = 4096
every_size = pytest.mark.parametrize(("dim", "experts"), [(16, 4), (64, 8), (64, 64), (256, 16)])


def cosines(random, dim, experts, spread, tokens=TOKENS):
    """(T, E): tokens around gate rows that are orthogonal, with noise of this length; infinity: isotropic tokens."""
    gates_ED = np.linalg.qr(random.standard_normal((dim, experts)))[0].T
    noise_TD = random.standard_normal((tokens, dim)) / math.sqrt(dim)
    if math.isfinite(spread):
        noise_TD = gates_ED[random.integers(experts, size=tokens)] + spread * noise_TD
    return noise_TD @ gates_ED.T / np.linalg.norm(noise_TD, axis=1, keepdims=True)


def estimate(config, cosine_TE):
    first_T1 = cosine_TE.argmax(1)[:, None]
    routing = routing_of(NumpyOps(), first_T1, np.ones(first_T1.shape), cosine_TE.shape[1], "float64")
    return estimate_from(np.asarray(affinity_statistics(NumpyOps(), config, cosine_TE, routing)))


def rows(config, cosine_TE, dim):
    found = estimate(config, cosine_TE)
    return estimated_rows(config, found.delta, counted_tokens(config, found), dim, cosine_TE.shape[1])


@pytest.mark.parametrize("seed", range(2))
@every_size
def test_the_more_tokens_gather_the_less_capacity_they_need(dim, experts, seed):
    """Down to the number of own tokens, weighted by itself as all estimates are."""
    found = [cosines(rng(seed), dim, experts, spread) for spread in (math.inf, 1.5, 0.5, 0.0)]
    load_E = np.bincount(found[-1].argmax(1), minlength=experts)
    own = (load_E**2).sum() / load_E.sum()
    for config, least, perfect in ((RIVALS, 0.9, own), (MINIMUM, 1.0, own), (CONTROLLER, 0.0, 0.0)):
        isotropic, loose, near, gathered = (rows(config, cosine_TE, dim) for cosine_TE in found)
        assert isotropic > 1.6 * own
        assert isotropic > loose >= 0.99 * near
        assert near == pytest.approx(least * own, rel=0.03)
        assert gathered == pytest.approx(perfect)


def test_isotropic_tokens_call_for_what_the_docs_say():
    """2.1, 1.3 and about 5 times T / E, for three shares that are given up."""
    dim, experts = 256, 16
    cosine_TE = cosines(rng(1), dim, experts, math.inf)
    configs = (RIVALS, CapacityConfig(policy="locmoe_plus", delta="quantile", quantile=0.25), MINIMUM)
    got = [rows(config, cosine_TE, dim) * experts / TOKENS for config in configs]
    assert got == pytest.approx([2.1, 1.3, 5.0], rel=0.1)


@pytest.mark.parametrize("experts", [2, 4, 64])
def test_the_most_that_may_be_given_up_leaves_isotropic_tokens_more_than_their_number(experts):
    config = CapacityConfig(policy="locmoe_plus", delta="quantile", quantile=MOST_GIVEN_UP)
    cosine_TE = cosines(rng(11), 64, experts, math.inf, tokens=32768)
    assert rows(config, cosine_TE, 64) > 0.98 * len(cosine_TE) / experts
    assert rows(config.model_copy(update={"quantile": 0.45}), cosine_TE, 64) < 0.9 * len(cosine_TE) / experts


@pytest.mark.parametrize("rule", ["rivals", "controller"])
@pytest.mark.parametrize("spread", [math.inf, 3.0])
@every_size
def test_the_more_tokens_are_to_be_kept_the_more_capacity_they_need(dim, experts, spread, rule):
    cosine_TE = cosines(rng(8), dim, experts, spread)
    shares = (0.25, 0.15, 0.1, 0.05, 0.01, 0.0)
    configs = [CapacityConfig(policy="locmoe_plus", rule=rule, delta="quantile", quantile=share) for share in shares]
    asked = [rows(config, cosine_TE, dim) for config in configs]
    assert asked == sorted(asked)
    assert asked[0] < asked[2] < asked[-1]
    assert asked[-1] == rows(CapacityConfig(policy="locmoe_plus", rule=rule, delta="minimum"), cosine_TE, dim)
    assert asked[2] == rows(CapacityConfig(policy="locmoe_plus", rule=rule), cosine_TE, dim)  # the default


@pytest.mark.parametrize("quantile", [0.1, 0.25])
@pytest.mark.parametrize("spread", [math.inf, 1.0, 0.3])
@every_size
def test_experts_of_that_capacity_keep_their_tokens(dim, experts, spread, quantile):
    """Of other tokens of the same distribution, each expert takes the best, whatever their first choice is."""
    random = rng(9)
    config = CapacityConfig(policy="locmoe_plus", delta="quantile", quantile=quantile)
    capacity = math.ceil(rows(config, cosines(random, dim, experts, spread), dim))
    kept = less = own = 0
    for _ in range(3):
        cosine_TE = cosines(random, dim, experts, spread)
        order_TE = np.argsort(-cosine_TE, axis=0)
        first_TE = np.take_along_axis(cosine_TE.argmax(1)[:, None] == np.arange(experts), order_TE, axis=0)
        own += first_TE.sum()
        kept, less = kept + first_TE[:capacity].sum(), less + first_TE[: capacity // 2].sum()
    assert kept / own >= 1 - quantile - 0.03
    assert less / own < 1 - quantile - 0.05  # and half as much would not do


@pytest.mark.parametrize("spread", [math.inf, 1.0, 0.7])
@pytest.mark.parametrize(("dim", "experts"), [(16, 4), (64, 8), (256, 16)])
def test_the_controllers_capacity_keeps_the_discriminative_token(dim, experts, spread):
    """The theorem of LocMoE+: one token with a cosine of delta among those that are irrelevant to expert 0."""
    random = rng(10)
    cosine_TE = cosines(random, dim, experts, spread)
    delta = estimate(CONTROLLER, cosine_TE).delta
    capacity = math.ceil(rows(CONTROLLER, cosine_TE, dim))
    irrelevant_T = cosine_TE[cosine_TE.argmax(1) != 0, 0]
    better = [(random.choice(irrelevant_T, len(irrelevant_T)) >= delta).sum() for _ in range(500)]
    assert np.mean(np.array(better) < capacity) >= 1 - math.exp(-3 * capacity / 16)


@every_size
def test_isotropic_tokens_have_the_rivals_that_the_theory_counts(dim, experts):
    """A token is a rival if its cosine is at least delta, one-sided, and not the largest that is."""
    found = [estimate(RIVALS, cosines(rng(seed), dim, experts, math.inf)) for seed in range(5)]
    delta = float(np.mean([each.delta for each in found]))
    near = two_sided_probability(delta, dim, "incomplete_beta") / 2
    own = arrival_probability(delta, dim, experts, "incomplete_beta", "independent") / experts
    wanted = TOKENS * (near - own)
    assert np.mean([each.rivals for each in found]) == pytest.approx(wanted, rel=0.1)


def test_own_tokens_are_no_rivals():
    """Three tokens of expert 0, two of expert 1, one without a first choice; by hand."""
    cosine_TE = np.array([[0.9, 0.1], [0.8, 0.3], [0.5, 0.2], [0.85, 0.95], [0.4, 0.6], [0.6, 0.7]])
    first_T1 = np.array([[0], [0], [0], [1], [1], [2]])
    routing = routing_of(NumpyOps(), first_T1, np.ones((6, 1)), 2, "float64")
    config = CapacityConfig(policy="locmoe_plus", delta="minimum")
    got = np.asarray(affinity_statistics(NumpyOps(), config, cosine_TE, routing))
    assert got == pytest.approx(np.array([[3, 2], [3 * 0.5, 2 * 0.6], [3 * 3, 2 * 2], [3 * 2, 2 * 1]]))
