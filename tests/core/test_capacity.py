import math

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import CapacityConfig
from moeport.core.capacity import drop_overflow, expert_capacity
from tests.conformance.targets import every_target, every_training_target
from tests.core.reference import served
from tests.core.routings import random_decisions, routing_of

EXPERTS = 5
DECISIONS = {
    "one choice": random_decisions(1, 40, 1, EXPERTS),
    "two choices": random_decisions(2, 40, 2, EXPERTS),
    "three choices": random_decisions(3, 23, 3, EXPERTS),
    "some to nowhere": random_decisions(4, 40, 2, EXPERTS, nowhere=True),
    "equal gates": (random_decisions(5, 20, 2, EXPERTS)[0], np.full((20, 2), 0.5)),
    "all to one expert": (np.full((9, 1), 3), np.arange(9)[:, None] / 16),
}
every_decision = pytest.mark.parametrize(("experts", "gates"), DECISIONS.values(), ids=DECISIONS)


def routed(experts, gates, ops=None, dtype="float64"):
    return routing_of(ops or NumpyOps(), experts, gates, EXPERTS, dtype)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 2.0])
@every_decision
def test_capacity_is_the_rounded_up_share(experts, gates, factor):
    config = CapacityConfig(policy="factor", factor=factor)
    assert expert_capacity(config, routed(experts, gates)) == math.ceil(factor * experts.size / EXPERTS)


def test_dropless_has_no_capacity():
    assert expert_capacity(CapacityConfig(factor=0.1), routed(*DECISIONS["two choices"])) is None


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize("capacity", [1, 3, 8])
@every_decision
@every_target
def test_the_same_are_dropped_as_by_a_loop(target, experts, gates, capacity, drop):
    ops = target.build().ops
    got = drop_overflow(ops, routed(experts, gates, ops), capacity, drop)
    kept = served(experts, gates, EXPERTS, capacity, drop)
    assert ops.to_numpy(got.expert_N).tolist() == np.where(kept, experts, EXPERTS).reshape(-1).tolist()
    assert ops.to_numpy(got.weight_N).tolist() == np.where(kept, gates, 0.0).reshape(-1).tolist()


def test_first_choices_come_before_earlier_second_choices():
    """Token 0 wants expert 1 second; token 1 wants it first and gets the one place."""
    got = drop_overflow(NumpyOps(), routed([[0, 1], [1, 2]], [[0.5, 0.5], [0.25, 0.75]]), 1, "position")
    assert got.expert_N.tolist() == [0, EXPERTS, 1, 2]
    assert got.weight_N.tolist() == [0.5, 0.0, 0.25, 0.75]


def test_probability_prefers_the_larger_gate_whatever_the_choice():
    got = drop_overflow(NumpyOps(), routed([[0, 1], [1, 2]], [[0.5, 0.5], [0.25, 0.75]]), 1, "probability")
    assert got.expert_N.tolist() == [0, 1, EXPERTS, 2]


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_capacity_for_all_drops_nobody(drop):
    experts, gates = DECISIONS["two choices"]
    got = drop_overflow(NumpyOps(), routed(experts, gates), experts.size, drop)
    assert got.expert_N.tolist() == experts.reshape(-1).tolist()
    assert got.weight_N.tolist() == gates.reshape(-1).tolist()


def test_what_the_balance_loss_reads_is_untouched():
    before = routed(*DECISIONS["two choices"])
    after = drop_overflow(NumpyOps(), before, 1, "position")
    assert after.probs_TE is before.probs_TE
    assert after.logits_TE is before.logits_TE
    assert after.balanced_choices == before.balanced_choices


@pytest.mark.parametrize("drop", ["position", "probability"])
@every_training_target
def test_the_gradient_reaches_served_gates_only(target, drop):
    backend = target.build()
    ops, (experts, gates) = backend.ops, DECISIONS["two choices"]

    def total(params):
        routing = routed(experts, gates, ops)
        routing = type(routing)(**{**vars(routing), "weight_N": params["gate"]})
        return ops.sum(drop_overflow(ops, routing, 3, drop).weight_N)

    _, grads = backend.value_and_grad(total)({"gate": routed(experts, gates, ops).weight_N})
    kept = served(experts, gates, EXPERTS, 3, drop)
    assert ops.to_numpy(grads["gate"]).tolist() == kept.reshape(-1).astype(float).tolist()
