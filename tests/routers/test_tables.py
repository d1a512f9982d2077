from dataclasses import replace

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.parameters import generator, initial_parameters
from moeport.core.routing import RouterContext
from moeport.errors import UserError
from moeport.routers import BY_NAME, build_router
from moeport.routers.tables import balanced_table, experts_at, first_ids, fixed_routing, position, random_table
from tests.conformance.targets import every_target
from tests.support import rng

EXPERTS = 8
ZIPF = np.maximum(1_000_000 // np.arange(1, 4001) ** 1.1, 1).astype(np.int64)


def loads(table_VK, counts_V, experts=EXPERTS):
    """Tokens of each expert."""
    return np.bincount(table_VK.reshape(-1), np.repeat(counts_V, table_VK.shape[1]), experts)


def test_each_id_goes_to_the_experts_with_the_fewest_tokens_so_far():
    counts = rng(1).permutation(np.arange(1, 301) ** 2)
    for choices in (1, 3):
        table = balanced_table(generator(0), counts, EXPERTS, choices)
        load = np.zeros(EXPERTS, np.int64)
        for token_id in np.argsort(-counts):
            chosen = table[token_id]
            assert len(set(chosen)) == choices
            assert sorted(load[chosen]) == sorted(load)[:choices]
            load[chosen] += counts[token_id]


def test_natural_frequencies_are_balanced_to_a_thousandth_where_random_draws_are_not():
    shuffled = rng(2).permutation(ZIPF)
    balanced = loads(balanced_table(generator(0), shuffled, EXPERTS, 1), shuffled)
    drawn = loads(random_table(generator(0), shuffled, EXPERTS), shuffled)
    # The most frequent id alone is an eighth of all tokens: one expert has nothing else.
    assert balanced.sum() == drawn.sum() == ZIPF.sum()
    assert np.sort(balanced)[-1] <= max(ZIPF.max(), 1.001 * ZIPF.sum() / EXPERTS)
    assert drawn.max() > 1.1 * drawn.mean()


def test_ids_that_never_occur_spread_over_the_experts():
    counts = np.concatenate([[90, 50, 40], np.zeros(800, np.int64)])
    unseen = np.bincount(balanced_table(generator(0), counts, EXPERTS, 1)[3:, 0], minlength=EXPERTS)
    assert unseen.max() - unseen.min() <= 90
    assert unseen.min() > 0
    alike = np.bincount(balanced_table(generator(0), np.ones(800, np.int64), EXPERTS, 1)[:, 0], minlength=EXPERTS)
    assert alike.tolist() == [100] * EXPERTS


def test_equals_are_taken_at_random():
    same = np.ones(64, np.int64)
    first, again, other = (balanced_table(generator(seed), same, EXPERTS, 1).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_all_experts_is_all_experts():
    assert balanced_table(generator(0), np.array([5, 0]), 3, 3).tolist() == [[0, 1, 2]] * 2


def test_random_draws_are_uniform():
    counts = np.bincount(random_table(generator(0), np.zeros(80_000), EXPERTS)[:, 0], minlength=EXPERTS)
    assert np.abs(counts - 10_000).max() < 5 * 100


@pytest.mark.parametrize("experts", [1, 8, 300])
@every_target
def test_numbers_of_experts_become_indices(target, experts):
    ops = target.build().ops
    table = rng(3).integers(experts, size=(7, 2))
    ids = np.array([6, 0, 3, 3])
    table_VK = ops.from_numpy(table.astype(np.float32))
    got = experts_at(ops, table_VK, ops.from_numpy(ids), experts)
    assert ops.dtype(got) == ops.dtype(ops.arange(1))
    assert ops.to_numpy(got).tolist() == table[ids].tolist()


@every_target
def test_positions_and_first_ids(target):
    ops = target.build().ops
    ids_T = ops.from_numpy(np.array([5, 6, 7, 3, 2, 1]))
    context = RouterContext(0, training=False, token_ids_T=ids_T, num_sequences=2)
    assert ops.to_numpy(position(ops, context, 6)).tolist() == [0, 1, 2, 0, 1, 2]
    assert ops.to_numpy(first_ids(ops, context, 6)).tolist() == [5, 5, 5, 3, 3, 3]
    given_T = ops.from_numpy(np.arange(6))
    continued = replace(context, position_T=given_T, first_id_T=given_T)
    assert ops.to_numpy(position(ops, continued, 6)).tolist() == [0, 1, 2, 3, 4, 5]
    assert ops.to_numpy(first_ids(ops, continued, 6)).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_fixed_routing_has_equal_gates_and_no_z_loss_gradient():
    routing = fixed_routing(NumpyOps(), np.array([[1, 3], [0, 2]]), 4, np.ones((2, 6)))
    assert np.asarray(routing.expert_N).tolist() == [1, 3, 0, 2]
    assert np.asarray(routing.weight_N).tolist() == [0.5] * 4
    assert np.asarray(routing.probs_TE).tolist() == [[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]]
    assert np.asarray(routing.logits_TE).tolist() == [[0.0] * 4] * 2


TABLED = [name for name, router in BY_NAME.items() if router.config_class.needs_token_ids]


def test_these_routers_look_at_ids():
    assert TABLED == ["hash", "rre", "random", "maskmoe"]


@pytest.mark.parametrize("name", TABLED)
def test_a_table_needs_the_number_of_ids(name):
    router = build_router(BY_NAME[name].config_class.model_validate({}), d_model=16, num_experts=4)
    with pytest.raises(UserError, match=rf"router {name} needs the number of vocabulary ids.*expected vocab_size"):
        router.parameter_specs()


@pytest.mark.parametrize("name", TABLED)
def test_tables_depend_on_seed_name_and_counts_alone(name):
    router = build_router(BY_NAME[name].config_class.model_validate({}), d_model=16, num_experts=4, vocab_size=200)
    spec = next(spec for spec in router.parameter_specs() if spec.is_table)
    counts = rng(4).permutation(np.arange(200) ** 2)

    def table(seed, counts):
        return initial_parameters([spec], seed, lambda: counts)[spec.name].tobytes()

    assert table(0, counts) == table(0, counts) != table(1, counts)
    assert (table(0, counts) == table(0, np.ones(200, np.int64))) == (name in ("rre", "random"))
    assert not spec.trainable
    assert not spec.decays
