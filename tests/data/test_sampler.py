import numpy as np
import pytest

from moeport.data.sampler import Sampler


@pytest.mark.parametrize(("num_sequences", "batch_size"), [(12, 4), (10, 3), (7, 7), (3, 10), (1, 2), (1, 1)])
def test_every_epoch_is_a_permutation(num_sequences, batch_size):
    sampler = Sampler(num_sequences, batch_size, seed=1)
    steps = 4 * num_sequences
    samples = np.concatenate([sampler.indices(step) for step in range(steps)])
    assert samples.dtype == np.int64
    assert samples.shape == (steps * batch_size,)
    for epoch in samples.reshape(-1, num_sequences):
        assert sorted(epoch) == list(range(num_sequences))


def test_epochs_and_seeds_have_their_own_orders():
    orders = {tuple(Sampler(20, 20, seed).indices(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_a_format():
    # Checkpoints resume by step number, so the order of a seed must not change.
    assert Sampler(10, 10, seed=0).indices(0).tolist() == [6, 3, 9, 4, 8, 1, 7, 0, 2, 5]


def test_any_step_can_be_resumed():
    whole = Sampler(10, 3, seed=5)
    expected = [whole.indices(step) for step in range(20)]
    for step in (19, 0, 7, 3, 4):
        np.testing.assert_array_equal(Sampler(10, 3, seed=5).indices(step), expected[step])
        np.testing.assert_array_equal(whole.indices(step), expected[step])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_share_one_batch(num_ranks):
    sampler = Sampler(17, 12, seed=2)
    for step in range(5):
        parts = [Sampler(17, 12, seed=2).rank_indices(step, rank, num_ranks) for rank in range(num_ranks)]
        assert {len(part) for part in parts} == {12 // num_ranks}
        np.testing.assert_array_equal(np.concatenate(parts), sampler.indices(step))
