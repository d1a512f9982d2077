import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance.formulas import softmax
from moeport.core.losses import load_balance_loss
from moeport.routers.gshard import GShardConfig
from tests.routers.examples import EXPERTS, choices, hidden_states, logits_as_tokens, route
from tests.support import assert_close

VARIANTS = [GShardConfig(random_second=False)]
"""Further configs for the tests of all routers."""
TOKENS = 4000


def repeated(second_gate, draws=TOKENS):
    """Tokens whose two best gates are 1 - g2 and g2."""
    logits = np.array([[np.log(1 - second_gate), np.log(second_gate), -30.0]])
    return route(GShardConfig(), *logits_as_tokens(np.repeat(logits, draws, axis=0)), num_experts=3)


def test_the_two_gates_sum_to_one_when_both_are_served():
    experts, gates = choices(route(GShardConfig(), training=False))
    assert (experts < EXPERTS).all()
    assert_close(gates.sum(axis=1), np.ones(len(gates)), 1e-15)
    assert (gates[:, 0] >= gates[:, 1]).all()


@pytest.mark.parametrize("second_gate", [0.05, 0.2, 0.4])
def test_the_second_expert_is_served_in_proportion_to_its_gate(second_gate):
    experts, gates = choices(repeated(second_gate))
    served = experts[:, 1] == 1
    expected = min(1.0, 2 * second_gate)
    four_deviations = 4 * np.sqrt(expected * (1 - expected) / TOKENS)
    assert abs(served.mean() - expected) < four_deviations
    assert set(experts[~served, 1]) == {3}
    assert set(gates[~served, 1]) == {0.0}
    assert_close(gates[served, 1], np.full(served.sum(), second_gate), 1e-9)


def test_equal_gates_are_both_served_always():
    experts, _ = choices(repeated(0.5))
    assert experts.tolist() == [[0, 1]] * TOKENS


def test_the_first_gate_is_not_renormalised_when_the_second_is_not_served():
    _, gates = choices(repeated(0.2, draws=50))
    assert_close(gates[:, 0], np.full(50, 0.8), 1e-9)


def test_noise_is_compared_with_twice_the_gate():
    """Uniform numbers u serve the second expert if 2 g2 > u."""
    routing = route(GShardConfig())
    experts, _ = choices(routing)
    noise = np.random.default_rng(20).random(routing.num_tokens)
    top_two = np.array([np.sort(softmax(row))[-2:] for row in routing.logits_TE])
    assert (experts[:, 1] < EXPERTS).tolist() == (2 * top_two[:, 0] / top_two.sum(axis=1) > noise).tolist()
    assert {True, False} == set((experts[:, 1] < EXPERTS).tolist())


@pytest.mark.parametrize(("random_second", "training"), [(True, False), (False, True), (False, False)])
def test_nothing_is_dropped_at_random_outside_training_or_when_turned_off(random_second, training):
    config = GShardConfig(random_second=random_second)
    experts, _ = choices(route(config, x_TD=hidden_states(tokens=200), training=training))
    assert (experts < EXPERTS).all()


def test_the_balance_loss_counts_first_choices_only():
    routing = route(GShardConfig())
    first = choices(routing)[0][:, 0]
    share = np.bincount(first, minlength=EXPERTS) / len(first)
    want = EXPERTS * np.sum(share * routing.probs_TE.mean(axis=0))
    assert_close(load_balance_loss(NumpyOps(), routing, 1), want, 1e-14)


def test_one_expert_is_a_problem():
    assert GShardConfig().problems(2) == []
    assert GShardConfig().problems(1) == [
        ("name", "gshard sends each token to 2 experts", "model.moe.num_experts of at least 2")
    ]
