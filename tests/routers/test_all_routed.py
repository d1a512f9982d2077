"""`Routing.all_routed` and `DispatchPlan.serves_every_row`: promises that no data may break."""

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.dispatch import plan_dispatch
from moeport.core.drop import drop_overflow
from moeport.routers import BY_NAME
from tests.routers.catalogue import CONFIGS, EXAMPLES, EXPERTS_CHOOSE
from tests.routers.examples import EXPERTS, TOKENS, WIDTH, build, hidden_states, label, route, router_params
from tests.support import rng

MAY_DECLINE = {"adamoe", "top_p", "locmoe_plus", "maskmoe"}
"""Routers that may leave a choice unrouted, in training and outside."""
every_config = pytest.mark.parametrize("config", CONFIGS + EXPERTS_CHOOSE, ids=label)

TOKENS_SEEN = {
    "normal": hidden_states(),
    "large": 100 * hidden_states(3),
    "zero": np.zeros((TOKENS, WIDTH)),
    "equal": np.tile(hidden_states()[:1], (TOKENS, 1)),
    "not a number": np.where(np.arange(TOKENS)[:, None] % 3 == 0, np.nan, hidden_states()),
}


def promised(config, training):
    return config.name not in MAY_DECLINE and not (config.name == "gshard" and config.random_second and training)


@every_config
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_what_a_router_promises_holds_for_all_tokens(config):
    for training in (True, False):
        for seed, x_TD in enumerate(TOKENS_SEEN.values()):
            routing = route(config, router_params(build(config), seed), x_TD, training)
            plan = plan_dispatch(NumpyOps(), routing)
            assert plan.serves_every_row is routing.all_routed is promised(config, training)
            if plan.serves_every_row:
                assert np.asarray(plan.counts_E).sum() == routing.expert_N.shape[0]
                assert np.asarray(routing.expert_N).max() < EXPERTS


def test_every_sparse_router_is_covered():
    covered = {config.name for config in CONFIGS + EXPERTS_CHOOSE}
    assert covered == {name for name in BY_NAME if not all(config.fixed_load for config in EXAMPLES[name])} | {
        config.name for config in EXPERTS_CHOOSE
    }
    assert set(BY_NAME) - covered == {"soft"}  # it has no assignments


@pytest.mark.parametrize("capacity", [1, TOKENS * 4, np.array([2])], ids=["one", "all", "estimated"])
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_capacity_takes_the_promise_back(config, capacity):
    """Even where it happens to drop nothing: what a kernel may leave out must not depend on the load."""
    routing = route(config)
    noise = [rng(choice).random(TOKENS) for choice in range(routing.choices_per_token)]
    for drop in ("position", "probability", "random", *(["affinity"] if config.has_affinity else [])):
        served = drop_overflow(NumpyOps(), routing, capacity, drop, noise)
        assert plan_dispatch(NumpyOps(), served).serves_every_row is False
