import numpy as np

from moeport.conformance.formulas import softmax
from moeport.routers.switch import SwitchConfig
from tests.routers.examples import logits_as_tokens, route
from tests.support import assert_close

LOGITS = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, -3.0]])


def test_gate_is_the_probability_of_the_best_expert():
    routing = route(SwitchConfig(), *logits_as_tokens(LOGITS), num_experts=3)
    assert routing.expert_N.tolist() == [1, 0]
    assert_close(routing.weight_N, [softmax(LOGITS[0])[1], softmax(LOGITS[1])[0]], 1e-15)


def test_the_balance_loss_counts_the_one_choice():
    assert route(SwitchConfig()).balanced_choices == 1
