from dataclasses import replace

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.drop import drop_overflow
from tests.conformance.targets import every_target, every_training_target
from tests.core.routings import random_decisions
from tests.model.reference import served
from tests.model.test_capacity import DECISIONS, EXPERTS, every_decision, routed
from tests.support import rng

POLICIES = ("position", "probability", "affinity", "random")
every_policy = pytest.mark.parametrize("drop", POLICIES)


def affinities(experts):
    """Multiples of 1/32 in (-1, 1), many equal, none the order of the gates."""
    return rng(6).integers(-31, 32, experts.shape) / 32


def draws(experts):
    """Uniform numbers of each choice, (T, K) float32."""
    return rng(7).random(experts.shape, np.float32)


def dropped(ops, experts, gates, capacity, drop, noise_TK=None):
    """(experts, gates) after the drop, each (T, K)."""
    experts = np.asarray(experts)
    noise_TK = draws(experts) if noise_TK is None else noise_TK
    routing = replace(
        routed(experts, gates, ops), affinity_N=ops.cast(ops.from_numpy(affinities(experts).reshape(-1)), "float32")
    )
    noise = [ops.from_numpy(noise_T) for noise_T in noise_TK.T] if drop == "random" else []
    got = drop_overflow(ops, routing, capacity, drop, noise)
    return [ops.to_numpy(array).reshape(experts.shape) for array in (got.expert_N, got.weight_N)]


@every_policy
@pytest.mark.parametrize("capacity", [1, 3, 8])
@every_decision
@every_target
def test_the_same_are_dropped_as_by_a_loop(target, experts, gates, capacity, drop):
    experts_after, gates_after = dropped(target.build().ops, experts, gates, capacity, drop)
    kept = served(experts, gates, EXPERTS, capacity, drop, affinities(experts), draws(experts))
    assert experts_after.tolist() == np.where(kept, experts, EXPERTS).tolist()
    assert gates_after.tolist() == np.where(kept, gates, 0.0).tolist()


@every_policy
@pytest.mark.parametrize("seed", range(20))
def test_every_expert_serves_as_many_as_came_or_its_capacity(drop, seed):
    experts, gates = random_decisions(seed, 30, 3, EXPERTS, unrouted=True)
    for capacity in (1, 2, 5, 11, 90):
        after, _ = dropped(NumpyOps(), experts, gates, capacity, drop)
        came = np.bincount(experts.reshape(-1), minlength=EXPERTS + 1)[:EXPERTS]
        assert (
            np.bincount(after.reshape(-1), minlength=EXPERTS + 1)[:EXPERTS].tolist()
            == np.minimum(came, capacity).tolist()
        )
        assert ((after == experts) | (after == EXPERTS)).all()


@every_target
def test_a_capacity_may_be_an_array(target):
    ops = target.build().ops
    experts, gates = DECISIONS["two choices"]
    want, _ = dropped(ops, experts, gates, 3, "position")
    for capacity in (ops.index(3), ops.from_numpy(np.array([3]))):
        assert dropped(ops, experts, gates, capacity, "position")[0].tolist() == want.tolist()


def test_first_choices_come_before_earlier_second_choices():
    """Token 0 wants expert 1 second; token 1 wants it first and gets the one place."""
    experts, gates = dropped(NumpyOps(), [[0, 1], [1, 2]], [[0.5, 0.5], [0.25, 0.75]], 1, "position")
    assert experts.tolist() == [[0, EXPERTS], [1, 2]]
    assert gates.tolist() == [[0.5, 0.0], [0.25, 0.75]]


def test_probability_prefers_the_larger_gate_whatever_the_choice():
    experts, _ = dropped(NumpyOps(), [[0, 1], [1, 2]], [[0.5, 0.5], [0.25, 0.75]], 1, "probability")
    assert experts.tolist() == [[0, 1], [EXPERTS, 2]]


@pytest.mark.parametrize("seed", range(10))
def test_affinity_keeps_the_best_of_each_expert(seed):
    experts, gates = random_decisions(seed, 40, 2, EXPERTS)
    after, _ = dropped(NumpyOps(), experts, gates, 4, "affinity")
    scores = affinities(experts)
    for expert in range(EXPERTS):
        kept, gone = scores[after == expert], scores[(experts == expert) & (after == EXPERTS)]
        assert not len(gone) or kept.min() >= gone.max()
        assert sorted(kept) == sorted(scores[experts == expert])[-4:]


def places_served(drop, trials=400, tokens=64, capacity=16):
    """How often the token at each place is served, where all tokens want one expert."""
    experts, gates = np.full((tokens, 1), 2), np.ones((tokens, 1))
    times = np.zeros(tokens)
    for trial in range(trials):
        after, _ = dropped(NumpyOps(), experts, gates, capacity, drop, rng(trial).random((tokens, 1), np.float32))
        times += after[:, 0] == 2
    return times


def test_random_serves_every_place_alike():
    """Chi-square of 400 draws of 16 of 64 places, scaled for draws without replacement; 63 degrees of freedom."""
    times, chance = places_served("random"), 16 / 64
    statistic = np.sum((times - 400 * chance) ** 2) / (400 * chance * (1 - chance)) * 63 / 64
    assert 34 < statistic < 104  # all but 0.1 % on either side


def test_position_serves_the_first_places_only():
    assert places_served("position", trials=1).tolist() == [1.0] * 16 + [0.0] * 48


def test_random_choices_of_a_token_are_drawn_apart():
    """If one number ordered both choices, tokens would be dropped by both experts or by neither."""
    experts, gates = np.tile([0, 1], (400, 1)), np.ones((400, 2))
    after, _ = dropped(NumpyOps(), experts, gates, 200, "random", rng(1).random((400, 2), np.float32))
    both = ((after == EXPERTS).sum(axis=1) == 2).sum()
    assert abs(both - 100) < 30


def test_random_outside_training_is_by_position():
    experts, gates = DECISIONS["two choices"]
    routing = routed(experts, gates)
    routings = (drop_overflow(NumpyOps(), routing, 3, drop) for drop in ("random", "position"))
    got, want = (np.asarray(dropped.expert_N).tolist() for dropped in routings)
    assert got == want


@every_policy
def test_capacity_for_all_drops_nobody(drop):
    experts, gates = DECISIONS["two choices"]
    after = dropped(NumpyOps(), experts, gates, experts.size, drop)
    assert [array.tolist() for array in after] == [experts.tolist(), gates.tolist()]


def test_what_the_balance_loss_reads_is_untouched():
    before = routed(*DECISIONS["two choices"])
    after = drop_overflow(NumpyOps(), before, 1, "position")
    assert after.probs_TE is before.probs_TE
    assert after.logits_TE is before.logits_TE
    assert after.balanced_choices == before.balanced_choices


@every_policy
@every_training_target
def test_the_gradient_reaches_served_gates_only(target, drop):
    backend = target.build()
    ops, (experts, gates) = backend.ops, DECISIONS["two choices"]
    affinity_N = ops.cast(ops.from_numpy(affinities(experts).reshape(-1)), "float32")
    noise = [ops.from_numpy(noise_T) for noise_T in draws(experts).T]

    def total(params):
        routing = replace(routed(experts, gates, ops), weight_N=params["gate"], affinity_N=affinity_N)
        return ops.sum(drop_overflow(ops, routing, 3, drop, noise).weight_N)

    _, grads = backend.value_and_grad(total)({"gate": routed(experts, gates, ops).weight_N})
    kept = served(experts, gates, EXPERTS, 3, drop, affinities(experts), draws(experts))
    assert ops.to_numpy(grads["gate"]).tolist() == kept.reshape(-1).astype(float).tolist()
