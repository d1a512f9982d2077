from dataclasses import replace

import numpy as np

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.routers.rre import RREConfig
from tests.conformance.targets import every_target
from tests.routers.examples import EXPERTS, build, choices, context, hidden_states, route, router_params, token_ids

VARIANTS = [RREConfig()]
"""Further configs for the tests of all routers."""


def routed(config, ids, num_sequences, ops=None, domain_B=None):
    """Experts of each token."""
    ops, router = ops or NumpyOps(), build(config)
    params = {name: ops.from_numpy(value) for name, value in router_params(router).items()}
    its_context = replace(
        context(router),
        token_ids_T=ops.from_numpy(ids),
        num_sequences=num_sequences,
        domain_B=None if domain_B is None else ops.from_numpy(domain_B),
    )
    routing = router.route(ops, params, ops.from_numpy(hidden_states(tokens=len(ids))), its_context)
    return ops.to_numpy(routing.expert_N)


def test_without_domains_the_table_says_the_expert():
    table = router_params(build(RREConfig()))["experts"]
    experts, gates = choices(route(RREConfig()))
    assert experts.tolist() == table[token_ids()].tolist()
    assert (gates == 1).all()
    assert set(table[:, 0]) <= set(range(EXPERTS))


@every_target
def test_a_sequence_stays_in_the_group_of_its_first_token(target):
    config, ids = RREConfig(groups=4), np.array([3, 0, 1, 2, 6, 3, 9, 5, 0, 0, 1, 2])
    experts = routed(config, ids, 3, target.build().ops)
    assert (experts // (EXPERTS // 4)).tolist() == [3] * 4 + [2] * 4 + [0] * 4
    place = router_params(build(config))["experts"][ids, 0]
    assert (experts % (EXPERTS // 4)).tolist() == place.tolist()
    assert set(place) == {0, 1}


@every_target
def test_a_sequence_stays_in_the_group_of_its_domain(target):
    config, ids = RREConfig(groups=2, group_by="domain"), np.array([3, 0, 1, 2, 6, 3, 9, 5, 0, 0, 1, 2])
    ops = target.build().ops
    place = router_params(build(config))["experts"][ids, 0]
    for domain_B, groups in ((np.array([1, 0, 1]), [1, 0, 1]), (np.array([2, 3, 1]), [0, 1, 1]), (None, [0, 0, 0])):
        experts = routed(config, ids, 3, ops, domain_B)
        assert (experts // (EXPERTS // 2)).tolist() == np.repeat(groups, 4).tolist()
        assert (experts % (EXPERTS // 2)).tolist() == place.tolist()


def test_later_tokens_change_no_group():
    ids = token_ids()
    before, after = routed(RREConfig(groups=4), ids, 1), routed(RREConfig(groups=4), np.r_[ids[:6], 9 - ids[6:]], 1)
    assert before[:6].tolist() == after[:6].tolist()


def test_groups_must_divide_the_experts():
    assert RREConfig(groups=4).problems(8) == []
    assert RREConfig(groups=3).problems(8) == [
        ("groups", "does not divide the experts", "a divisor of model.moe.num_experts (8)")
    ]


def test_nothing_is_trained():
    assert [spec.name for spec in build(RREConfig()).parameter_specs() if spec.trainable] == []
    assert build(RREConfig()).load_balance == 0
