"""The traffic of communication benchmarks."""

import numpy as np
import pytest

from moeport.errors import UserError
from moeport.plan.traffic import expert_choices

EXPERTS, TOKENS = 16, 4000


def choices(kind, top_k=4, tokens=TOKENS, rank=1, size=4, node=0, nodes=2, num_experts=EXPERTS):
    return expert_choices(kind, tokens, num_experts, top_k, rank=rank, size=size, node=node, nodes=nodes)


@pytest.mark.parametrize("kind", ["uniform", "zipf", "local:0.7", "local:0", "local:1"])
@pytest.mark.parametrize("top_k", [1, 4, EXPERTS])
def test_each_token_has_different_experts(kind, top_k):
    expert_TK = choices(kind, top_k)
    assert expert_TK.shape == (TOKENS, top_k)
    assert all(len(set(row)) == top_k for row in expert_TK.tolist())
    assert expert_TK.min() >= 0
    assert expert_TK.max() < EXPERTS


def test_uniform_is_even():
    load_E = np.bincount(choices("uniform").reshape(-1), minlength=EXPERTS)
    np.testing.assert_allclose(load_E / TOKENS, 4 / EXPERTS, rtol=0.12)


def test_zipf_loads_fall_as_one_over_rank_and_ranks_agree_on_the_order():
    loads = [np.bincount(choices("zipf", 1, rank=rank).reshape(-1), minlength=EXPERTS) for rank in (0, 1)]
    want = 1 / np.arange(1, EXPERTS + 1)
    order = np.argsort(-loads[0])
    for load_E in loads:
        np.testing.assert_allclose(load_E[order] / TOKENS, want / want.sum(), atol=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8, 1.0])
def test_local_is_the_share_on_the_own_node(fraction):
    for node in (0, 1):
        near = choices(f"local:{fraction}", node=node) // (EXPERTS // 2) == node
        assert near.mean() == pytest.approx(fraction, abs=0.02)


def test_local_stops_where_the_node_has_no_more_experts():
    near = choices("local:1", top_k=10) < EXPERTS // 2
    assert (near.sum(1) == EXPERTS // 2).all()


def test_recorded_tokens_are_divided_among_ranks(tmp_path):
    recorded = np.arange(24).reshape(12, 2) % EXPERTS
    path = tmp_path / "routes.npy"
    np.save(path, recorded)
    np.testing.assert_array_equal(choices(str(path), 2, tokens=3, rank=1), recorded[3:6])
    np.testing.assert_array_equal(choices(str(path), 2, tokens=5, rank=3), recorded[[9, 10, 11, 9, 10]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 3), int), r"is int64 \(8, 3\); expected integers \(tokens, 2\)"),
        (np.zeros((8, 2)), r"is float64 \(8, 2\); expected integers"),
        (np.zeros((3, 2), int), "has 3 tokens with experts 0 .. 0; expected at least 4 tokens"),
        (np.full((8, 2), EXPERTS), "has 8 tokens with experts 16 .. 16; expected at least 4 tokens, one per rank, and"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, array, message):
    path = tmp_path / "routes.npy"
    np.save(path, array)
    with pytest.raises(UserError, match=message):
        choices(str(path), 2)


@pytest.mark.parametrize("kind", ["even", "local:", "local:1.5", "local:x"])
def test_another_kind_is_refused(kind):
    with pytest.raises(UserError, match="expected uniform, zipf, local:F"):
        choices(kind)
