import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.drop import drop_overflow
from moeport.core.positions import drops_by_position, position_ranges
from tests.conformance.targets import every_target
from tests.core.routings import random_decisions, routing_of

EXPERTS, SEQUENCES = 5, 2


@pytest.mark.parametrize(("length", "ranges"), [(1, 1), (7, 7), (16, 16), (17, 16), (256, 16)])
def test_at_most_sixteen_ranges(length, ranges):
    assert position_ranges(length) == ranges


@pytest.mark.parametrize("length", [6, 16, 20, 40])
@every_target
def test_drops_are_counted_where_they_happen(target, length):
    ops = target.build().ops
    experts, gates = random_decisions(1, SEQUENCES * length, 2, EXPERTS, unrouted=True)
    chosen = routing_of(ops, experts, gates, EXPERTS, "float32")
    served = drop_overflow(ops, chosen, 3, "position", ())
    kept = ops.to_numpy(served.expert_N).reshape(SEQUENCES, length, 2) < EXPERTS
    wanted = np.asarray(experts).reshape(SEQUENCES, length, 2) < EXPERTS
    want = np.zeros((2, position_ranges(length)), int)
    for position in range(length):
        where = position * position_ranges(length) // length
        want[0, where] += wanted[:, position].sum()
        want[1, where] += (wanted & ~kept)[:, position].sum()
    assert want[1].sum() > 0
    assert ops.to_numpy(drops_by_position(ops, chosen, served, SEQUENCES)).tolist() == want.tolist()


def test_the_last_of_a_batch_are_dropped_by_position():
    chosen = routing_of(NumpyOps(), np.zeros((32, 1), int), np.ones((32, 1)), EXPERTS, "float64")
    served = drop_overflow(NumpyOps(), chosen, 24, "position", ())
    assert np.asarray(drops_by_position(NumpyOps(), chosen, served, 2)).tolist() == [[2] * 16, [0] * 8 + [1] * 8]
