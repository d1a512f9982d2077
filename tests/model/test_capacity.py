import math

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import CapacityConfig
from moeport.core.bounds import lower_bound
from moeport.model.capacity import (
    AVERAGES,
    CAPACITY,
    MAX_ROWS,
    affinity_statistics,
    capacity_specs,
    estimate_from,
    estimated_rows,
    expert_capacity,
    updated_capacity,
)
from tests.conformance.targets import TOLERANCE, every_target
from tests.core.routings import random_decisions, routing_of
from tests.support import assert_close, grid

EXPERTS, DIM = 5, 64
DECISIONS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "one choice": random_decisions(1, 40, 1, EXPERTS),
    "two choices": random_decisions(2, 40, 2, EXPERTS),
    "three choices": random_decisions(3, 23, 3, EXPERTS),
    "some unrouted": random_decisions(4, 40, 2, EXPERTS, unrouted=True),
    "equal gates": (random_decisions(5, 20, 2, EXPERTS)[0], np.full((20, 2), 0.5)),
    "all to one expert": (np.full((9, 1), 3), np.arange(9)[:, None] / 16),
}
every_decision = pytest.mark.parametrize(("experts", "gates"), DECISIONS.values(), ids=DECISIONS)
ESTIMATORS = ("minimum", "quantile", "mean", "maximum")


def routed(experts, gates, ops=None, dtype="float64"):
    return routing_of(ops or NumpyOps(), experts, gates, EXPERTS, dtype)


def limited(config, routing, rows=0.0, ops=None):
    """The capacity in a layer whose estimate is `rows`."""
    ops = ops or NumpyOps()
    capacity = expert_capacity(ops, config, {CAPACITY: ops.from_numpy(np.array([rows], np.float32))}, routing)
    return capacity if capacity is None or isinstance(capacity, int) else ops.to_numpy(capacity).tolist()


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 2.0])
@every_decision
def test_capacity_is_the_rounded_up_share(experts, gates, factor):
    config = CapacityConfig(policy="factor", factor=factor)
    assert limited(config, routed(experts, gates)) == math.ceil(factor * experts.size / EXPERTS)


def test_dropless_has_no_capacity():
    assert limited(CapacityConfig(factor=0.1), routed(*DECISIONS["two choices"])) is None


@pytest.mark.parametrize(
    ("rows", "want"), [(0.0, 20), (1.0, 4), (4.0, 4), (5.0, 5), (19.0, 19), (20.0, 20), (21.0, 20), (MAX_ROWS, 20)]
)
@every_target
def test_an_estimate_is_clipped_to_floor_and_factor_bound(target, rows, want):
    """40 tokens, two choices, 5 experts: 1.25 times the even share of 16 is 20. No estimate yet: the factor bound."""
    ops = target.build().ops
    config = CapacityConfig(policy="locmoe", floor=4, factor=1.25)
    assert limited(config, routed(*DECISIONS["two choices"], ops=ops), rows, ops) == [want]


@pytest.mark.parametrize(("tokens", "factor"), [(40, 1.0), (40, 1.05), (23, 0.3), (1, 1.0)])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_the_factor_bound_is_rounded_up_as_in_vmoe(tokens, factor, multiple_of):
    """Its compute_capacity: ceil(tokens * K * factor / E), plus what is missing to a multiple."""
    routing = routed(*random_decisions(1, tokens, 2, EXPERTS))
    config = CapacityConfig(policy="factor", factor=factor, multiple_of=multiple_of)
    want = math.ceil(tokens * 2 * factor / EXPERTS)
    assert expert_capacity(NumpyOps(), config, {}, routing) == want + (-want) % multiple_of


def test_the_factor_bound_wins_over_the_floor():
    config = CapacityConfig(policy="locmoe_plus", floor=64)
    assert limited(config, routed(*DECISIONS["two choices"]), 8.0) == [20]


def expected_statistics(config, cosine_TE, first_T):
    """(4, E) by loops."""
    count, delta, kept, rivals = np.zeros((4, EXPERTS))
    for expert in range(EXPERTS):
        own, others = np.sort(cosine_TE[first_T == expert, expert]), cosine_TE[first_T != expert, expert]
        if not len(own):
            continue
        place = min(len(own) * round(config.delta_quantile * 1000) // 1000, len(own) - 1)
        value = {"minimum": own[0], "quantile": own[place], "mean": own.mean(), "maximum": own[-1]}[config.estimator]
        count[expert], delta[expert] = len(own), len(own) * value
        kept[expert], rivals[expert] = (len(own) * (cosine_E >= value).sum() for cosine_E in (own, others))
    return np.stack([count, delta, kept, rivals])


@pytest.mark.parametrize(
    ("estimator", "quantile"),
    [("minimum", 0.9), ("mean", 0.9), ("maximum", 0.9), *(("quantile", share) for share in (0.0, 0.25, 0.9, 1.0))],
)
@every_decision
@every_target
def test_statistics_are_those_of_a_loop(target, experts, gates, estimator, quantile):
    """Cosines are float32 at least, whatever the compute type."""
    ops = target.build().ops
    config = CapacityConfig(policy="locmoe", delta=estimator, quantile=quantile)
    cosine_TE = grid(3, len(experts), EXPERTS) / 2
    kind = "float64" if target.dtype == "float64" else "float32"
    placed = ops.cast(ops.from_numpy(cosine_TE), kind)
    got = ops.to_numpy(affinity_statistics(ops, config, placed, routed(experts, gates, ops)))
    assert_close(got, expected_statistics(config, cosine_TE, np.asarray(experts)[:, 0]), TOLERANCE[kind])


@pytest.mark.parametrize("estimator", ["minimum", "quantile"])
@every_target
def test_equal_tokens_are_counted_alike_though_they_differ_by_rounding(target, estimator):
    """Ten own tokens and five rivals of expert 1 all have a cosine of 0.7, give or take 1e-7."""
    ops = target.build().ops
    cosine_TE = np.full((16, EXPERTS), 0.1)
    cosine_TE[:15, 1] = 0.7 + 1e-7 * np.array([-1, 1, 0, 2, -2] * 3)
    first_T1 = np.array([[1]] * 10 + [[0]] * 6)
    config = CapacityConfig(policy="locmoe_plus", delta=estimator)
    routing = routed(first_T1, np.ones((16, 1)), ops)
    got = ops.to_numpy(affinity_statistics(ops, config, ops.from_numpy(cosine_TE.astype(np.float32)), routing))
    assert got[2:, 1].tolist() == [100.0, 50.0]


def test_statistics_of_micro_batches_add_up():
    """With the mean, delta is that of the whole batch; with the others, the mean of the micro-batches' estimates."""
    experts, gates = DECISIONS["two choices"]
    experts, gates, cosine_TE = np.asarray(experts), np.asarray(gates), grid(4, 40, EXPERTS) / 2
    for estimator in ESTIMATORS:
        config = CapacityConfig(policy="locmoe", delta=estimator)
        whole = np.asarray(affinity_statistics(NumpyOps(), config, cosine_TE, routed(experts, gates)))
        halves = [
            np.asarray(affinity_statistics(NumpyOps(), config, cosine_TE[rows], routed(experts[rows], gates[rows])))
            for rows in (slice(0, 20), slice(20, 40))
        ]
        both = estimate_from(np.sum(halves, axis=0))
        assert both.delta == pytest.approx(np.mean([estimate_from(half).delta for half in halves]))
        if estimator == "mean":
            assert both.delta == pytest.approx(estimate_from(whole).delta)


def test_no_token_no_estimate():
    assert estimate_from(np.zeros((4, EXPERTS))) is None


def statistics(delta, rivals, kept=7.0, count=10.0):
    """Of a step in which all experts agree."""
    return np.array([[x] * EXPERTS for x in (count, count * delta, count * kept, count * rivals)])


def run(config, steps):
    """State after each of some steps, given as (delta, rivals)."""
    state = {spec.name: np.zeros(spec.shape, np.float32) for spec in capacity_specs(config)}
    states = []
    for delta, rivals in steps:
        state = state | updated_capacity(config, state, statistics(delta, rivals), DIM, EXPERTS)
        states.append(state)
    return states


def test_only_estimated_capacities_have_parameters():
    assert capacity_specs(CapacityConfig()) == capacity_specs(CapacityConfig(policy="factor")) == []
    assert [(spec.name, spec.shape, spec.trainable) for spec in capacity_specs(CapacityConfig(policy="locmoe"))] == [
        ("capacity", (1,), False),
        ("capacity_averages", (3,), False),
    ]


def test_locmoe_is_the_bound_at_the_running_mean():
    config = CapacityConfig(policy="locmoe", ema_decay=0.5, bound="erfc", probability="paper")
    first, second = run(config, [(0.2, 3.0), (0.4, 5.0)])
    assert first[AVERAGES] == pytest.approx([1, 0.2, 3.0])
    assert second[AVERAGES] == pytest.approx([2, 0.3, 4.0])
    assert first[CAPACITY] == math.ceil(lower_bound(0.2, DIM, EXPERTS, "erfc"))
    assert second[CAPACITY] == math.ceil(lower_bound(float(np.float32(0.3)), DIM, EXPERTS, "erfc"))
    assert second[CAPACITY].dtype == second[AVERAGES].dtype == np.float32


@pytest.mark.parametrize(("rule", "want"), [("rivals", [37, 18, 7]), ("controller", [60, 21, 1])])
def test_locmoe_plus_follows_the_rivals(rule, want):
    """Seven own tokens are to be kept."""
    config = CapacityConfig(policy="locmoe_plus", rule=rule, ema_decay=0.0)
    states = run(config, [(0.2, 30.0), (0.2, 10.25), (0.2, 0.0)])
    assert [float(state[CAPACITY][0]) for state in states] == want


def test_the_largest_cosine_is_what_delta_max_means():
    config = CapacityConfig(policy="locmoe_plus", rule="delta_max")
    assert config.estimator == "maximum"
    assert CapacityConfig(policy="locmoe_plus", rule="delta_max", delta="quantile").estimator == "quantile"
    assert estimated_rows(config, 0.25, 0.0, DIM, EXPERTS) == pytest.approx(
        math.exp(DIM * 0.0625 / (2 - 0.0625)) / EXPERTS
    )


def test_an_infinite_bound_is_as_many_as_there_are():
    (state,) = run(CapacityConfig(policy="locmoe"), [(1.0, 0.0)])
    assert state[CAPACITY] == MAX_ROWS


def test_it_is_frozen_on_request():
    first, *later = run(CapacityConfig(policy="locmoe", freeze_after=1), [(0.1, 1.0), (0.3, 2.0), (0.5, 3.0)])
    for state in later:
        assert all(np.array_equal(state[name], first[name]) for name in first)


def test_it_is_updated_every_so_many_steps():
    """The mean follows every step; the capacity the first and then the fourth and the eighth."""
    config = CapacityConfig(policy="locmoe_plus", rule="controller", ema_decay=0.0, update_interval=4)
    states = run(config, [(0.1, float(step)) for step in range(1, 10)])
    assert [float(state[CAPACITY][0]) for state in states] == [2, 2, 2, 8, 8, 8, 8, 16, 16]
    assert [float(state[AVERAGES][2]) for state in states] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_step_without_tokens_changes_nothing():
    config = CapacityConfig(policy="locmoe")
    (state,) = run(config, [(0.1, 1.0)])
    assert updated_capacity(config, state, np.zeros((4, EXPERTS)), DIM, EXPERTS) == {}
