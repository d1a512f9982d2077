"""Cosines of tokens and gate rows, which estimated capacities need."""

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config import Config, check_rules
from moeport.config.model import CapacityConfig, ModelConfig, MoEConfig
from moeport.routers import BY_NAME
from tests.conformance.targets import TOLERANCE, every_target
from tests.routers.catalogue import EXAMPLES
from tests.routers.examples import EXPERTS, WIDTH, build, context, hidden_states, router_params
from tests.support import assert_close

WITH_ROWS = [name for name, router in BY_NAME.items() if router.config_class.has_gate_rows]
LINEAR = {
    "switch",
    "topk",
    "gshard",
    "sigmoid_bias",
    "top_p",
    "adamoe",
    "sinkhorn_token_choice",
    "cartesian",
    "maskmoe",
}


def cosines(x_TD, rows_ED):
    return x_TD @ rows_ED.T / np.linalg.norm(x_TD, axis=1, keepdims=True) / np.linalg.norm(rows_ED, axis=1)


def expected(name, router, params, x_TD):
    if name in LINEAR:
        return cosines(x_TD, params["weight"][:EXPERTS])
    if name == "xmoe":
        return cosines(x_TD @ params["projection"].T, params["weight"])
    size = x_TD.shape[1] // EXPERTS
    return cosines(x_TD, np.repeat(np.eye(EXPERTS), size, axis=1))


@pytest.mark.parametrize("name", WITH_ROWS)
@every_target
def test_cosines_are_those_of_the_gate_rows(target, name):
    backend = target.build()
    ops, config = backend.ops, EXAMPLES[name][0]
    router = build(config)
    params = router_params(router)
    placed = {key: ops.cast(ops.from_numpy(value), backend.parameter_dtype) for key, value in params.items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), backend.dtype)
    got = router.gate_cosines(ops, placed, x_TD)
    want = expected(name, router, params, ops.to_numpy(x_TD).astype(np.float64))
    accurate = "float64" if target.dtype == "float64" else "float32"
    assert ops.dtype(got) == accurate
    assert_close(ops.to_numpy(got), want, 10 * TOLERANCE[accurate])


@pytest.mark.parametrize("name", WITH_ROWS)
def test_their_tokens_choose_experts(name):
    """A capacity limits the choices of tokens; where experts choose, there is none."""
    router = build(EXAMPLES[name][0])
    routing = router.route(NumpyOps(), router_params(router), hidden_states(), context(router))
    assert routing.choices_per_token == EXAMPLES[name][0].experts_per_token


def test_dimensions_are_those_of_the_comparison():
    assert build(EXAMPLES["topk"][0]).gate_dim == WIDTH
    assert [build(config).gate_dim for config in EXAMPLES["xmoe"]] == [16, 3, 4]


@pytest.mark.parametrize("policy", ["locmoe", "locmoe_plus"])
@pytest.mark.parametrize("name", BY_NAME)
def test_estimated_capacities_are_refused_without_gate_rows(name, policy):
    moe = MoEConfig(router=BY_NAME[name].config_class.model_validate({}), capacity=CapacityConfig(policy=policy))
    found = [problem for problem in check_rules(Config(model=ModelConfig(moe=moe))) if "capacity" in problem.key]
    if name in WITH_ROWS:
        assert found == []
        return
    (problem,) = (problem for problem in found if "gate rows" in problem.wrong)
    assert problem.key == "model.moe.capacity.policy"
    assert (
        problem.wrong
        == f"needs the cosines between tokens and gate rows, but {name} does not have one gate row per expert"
    )
    assert problem.expected.startswith("another policy, or a router with gate rows: switch, topk")
