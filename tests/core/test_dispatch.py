import numpy as np
import pytest

from moeport.core.dispatch import combine, dispatch
from tests.conformance.targets import TOLERANCE, every_target
from tests.core.routings import random_decisions, routing_of
from tests.support import assert_close, grid

DECISIONS = {
    "one choice": random_decisions(1, 10, 1, 4),
    "two choices": random_decisions(2, 10, 2, 4),
    "all experts": random_decisions(3, 5, 4, 4),
    "some unrouted": random_decisions(4, 10, 2, 4, unrouted=True),
    "one token": random_decisions(5, 1, 2, 4),
    "all unrouted": (np.full((3, 2), 4), np.zeros((3, 2))),
    "one expert of four": (np.full((6, 1), 2), np.full((6, 1), 0.5)),
}
every_decision = pytest.mark.parametrize(("experts", "gates"), DECISIONS.values(), ids=DECISIONS)


def dispatched(backend, experts, gates):
    ops = backend.ops
    accurate = "float64" if backend.dtype == "float64" else "float32"
    routing = routing_of(ops, experts, gates, 4, accurate)
    x_TD = ops.cast(ops.from_numpy(grid(0, len(experts), 3)), backend.dtype)
    return routing, *dispatch(ops, x_TD, routing)


@every_decision
@every_target
def test_identity_experts_give_the_weighted_sum(target, experts, gates):
    backend = target.build()
    routing, x_RD, _, plan = dispatched(backend, experts, gates)
    got = backend.ops.to_numpy(combine(backend.ops, x_RD, routing, plan))
    assert_close(got, grid(0, len(experts), 3) * gates.sum(axis=1, keepdims=True), TOLERANCE[target.dtype])


@every_decision
@every_target
def test_rows_are_sorted_by_expert_and_keep_token_order(target, experts, gates):
    backend = target.build()
    ops = backend.ops
    _, x_RD, counts_E, plan = dispatched(backend, experts, gates)
    assignments = sorted(range(experts.size), key=lambda n: (experts.reshape(-1)[n], n))
    tokens = [n // experts.shape[1] for n in assignments]
    assert ops.to_numpy(plan.order_R).tolist() == assignments
    assert ops.to_numpy(plan.position_N).tolist() == np.argsort(assignments).tolist()
    assert ops.to_numpy(plan.token_R).tolist() == tokens
    assert ops.to_numpy(x_RD).tolist() == grid(0, len(experts), 3)[tokens].tolist()
    assert ops.to_numpy(counts_E).tolist() == [int((experts == expert).sum()) for expert in range(4)]
    assert (plan.num_tokens, plan.choices_per_token) == experts.shape
