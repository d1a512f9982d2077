"""The routers in which experts choose tokens."""

import functools
import math

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance import formulas
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.expert_choice import ExpertChoiceConfig
from moeport.routers.sinkhorn_expert_choice import SinkhornExpertChoiceConfig
from moeport.routers.sparsity_constrained import SparsityConstrainedExpertChoiceConfig, potentials, sparse_columns
from tests.conformance.targets import TOLERANCE, every_target
from tests.routers.examples import label, logits_as_tokens, shipped
from tests.support import assert_close, assert_gradient, finite_difference, rng

EXPERTS = 8
VARIANTS = [
    ExpertChoiceConfig(mean_experts=0.4, group="batch"),
    ExpertChoiceConfig(mean_experts=EXPERTS),
    SinkhornExpertChoiceConfig(mean_experts=3.5, group="batch", sinkhorn_iterations=3),
    SparsityConstrainedExpertChoiceConfig(mean_experts=6.5, group="batch", solver_iterations=3),
]
"""Further configs for the tests of all routers."""
KINDS = (ExpertChoiceConfig, SinkhornExpertChoiceConfig, SparsityConstrainedExpertChoiceConfig)
every_kind = pytest.mark.parametrize("kind", KINDS)


def softmax(logits):
    return np.apply_along_axis(formulas.softmax, -1, logits)


def scores(sequences, length, seed=1, experts=EXPERTS):
    """Logits of sequences, skewed to the later experts."""
    return rng(seed).standard_normal((sequences, length, experts)) + np.linspace(-1, 1, experts)


def routed(config, logits_BSE):
    """The routing of tokens whose logits these are."""
    sequences, _, experts = logits_BSE.shape
    params, x_TD = logits_as_tokens(logits_BSE.reshape(-1, experts))
    context = RouterContext(layer=0, training=True, num_sequences=sequences)
    return build_router(config, experts, experts).route(NumpyOps(), params, x_TD, context)


def taken(routing):
    """{(token, expert): gate}; no expert takes a token twice."""
    pairs = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    return dict(zip(pairs, routing.weight_N.tolist(), strict=True))


def best(score_SE, capacity):
    """Pairs of the C tokens that each expert scores highest."""
    return {(int(t), e) for e in range(score_SE.shape[1]) for t in np.argsort(-score_SE[:, e])[:capacity]}


def plan_of(config, logits_SE):
    """What an expert ranks tokens by, for the kinds with a closed form or a plain iteration."""
    if isinstance(config, ExpertChoiceConfig):
        return softmax(logits_SE)
    plan = np.exp(logits_SE)
    for _ in range(config.sinkhorn_iterations):
        plan /= plan.sum(axis=1, keepdims=True)
        plan *= len(plan) / plan.shape[1] / plan.sum(axis=0)
    return plan


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_each_expert_takes_the_best_of_each_group_with_softmax_gates(kind, factor, group):
    config = kind(mean_experts=factor, group=group)
    logits_BSE = scores(3, 20)
    groups = logits_BSE if group == "sequence" else logits_BSE.reshape(1, -1, EXPERTS)
    size = groups.shape[1]
    want = {
        (g * size + token, expert)
        for g, logits_SE in enumerate(groups)
        for token, expert in best(plan_of(config, logits_SE), math.ceil(factor * size / EXPERTS))
    }
    got = taken(routed(config, logits_BSE))
    assert got.keys() == want
    probs_TE = softmax(logits_BSE).reshape(-1, EXPERTS)
    for (token, expert), gate in got.items():
        assert gate == pytest.approx(probs_TE[token, expert], rel=1e-14)


@every_kind
@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 40])
def test_the_load_is_that_of_the_capacity_for_sequences_of_any_length(kind, length):
    """Shorter ones than there are experts too, as at the beginning of a text that is generated."""
    config = kind()
    routing = routed(config, scores(3, length))
    capacity = math.ceil(2 * length / EXPERTS)
    assert 1 <= capacity <= length or length == 1
    assert np.bincount(routing.expert_N, minlength=EXPERTS).tolist() == [3 * capacity] * EXPERTS
    assert len(routing.expert_N) == config.assignments(3 * length, EXPERTS, 3) == 3 * EXPERTS * capacity
    by_sequence = np.bincount(routing.token_N // length, minlength=3)
    assert by_sequence.tolist() == [EXPERTS * capacity] * 3
    assert routing.choices_per_token is None
    taken(routing)


@every_kind
def test_batch_mates_do_not_matter_where_the_group_is_a_sequence(kind):
    logits_BSE = scores(4, 12)
    together = taken(routed(kind(), logits_BSE))
    for i, logits_SE in enumerate(logits_BSE):
        alone = taken(routed(kind(), logits_SE[None]))
        assert {(12 * i + token, expert): gate for (token, expert), gate in alone.items()}.items() <= together.items()


@every_kind
def test_batch_mates_matter_where_the_group_is_the_batch(kind):
    logits_BSE = scores(4, 12)
    logits_BSE[0] += 3 * rng(2).standard_normal((12, EXPERTS))
    assert taken(routed(kind(group="batch"), logits_BSE)).keys() != taken(routed(kind(), logits_BSE)).keys()


@every_kind
def test_later_tokens_change_what_happens_to_earlier_ones(kind):
    """So no language model may use it unless the config says so."""
    assert kind.looks_ahead
    logits_BSE, changed = scores(1, 12), scores(1, 12)
    changed[0, -1] += 5 * rng(3).standard_normal(EXPERTS)
    before, after = ({pair for pair in taken(routed(kind(), x)) if pair[0] < 11} for x in (logits_BSE, changed))
    assert before != after


@every_kind
def test_with_as_many_experts_a_token_as_there_are_every_expert_takes_every_token(kind):
    got = taken(routed(kind(mean_experts=EXPERTS), scores(2, 6)))
    assert got.keys() == {(token, expert) for token in range(12) for expert in range(EXPERTS)}


@every_kind
def test_of_equal_scores_the_earlier_token_is_taken(kind):
    got = taken(routed(kind(), np.zeros((2, 12, EXPERTS))))
    assert got.keys() == {(12 * b + token, expert) for b in range(2) for token in range(3) for expert in range(EXPERTS)}


def test_transport_leaves_fewer_tokens_without_an_expert():
    """A plan has a mass for every token; the best of each expert's column do not care for a token that none prefers."""
    logits_BSE = 2 * scores(1, 256, seed=5)
    logits_BSE[0, :64] *= 0.1
    left = {kind: 256 - len({t for t, _ in taken(routed(kind(mean_experts=1), logits_BSE))}) for kind in KINDS}
    assert left[SinkhornExpertChoiceConfig] < left[ExpertChoiceConfig]
    assert left[SparsityConstrainedExpertChoiceConfig] < left[ExpertChoiceConfig]


def test_more_experts_a_token_than_experts_are_a_problem():
    for kind in KINDS:
        assert kind(mean_experts=4).problems(4) == []
        [(option, wrong, expected)] = kind(mean_experts=4.5).problems(4)
        assert (option, wrong) == ("mean_experts", "more experts per token than there are")
        assert expected == "at most model.moe.num_experts (4)"


@pytest.mark.parametrize(("factor", "number"), [(0.2, 1), (1.0, 1), (1.6, 2), (2.0, 2), (3.4, 3)])
def test_the_number_of_experts_a_token_is_a_mean_to_the_next_integer(factor, number):
    assert ExpertChoiceConfig(mean_experts=factor).experts_per_token == number


@pytest.mark.parametrize("config", [*(c for kind in KINDS for c in shipped()[kind().name]), *VARIANTS], ids=label)
def test_gates_and_decisions_of_a_group_of_many_tokens_on_the_reference(config):
    routing = routed(config, scores(2, 64))
    assert (routing.weight_N > 0).all()
    assert routing.expert_N.dtype == routing.token_N.dtype == np.int64


# ---------------------------------------------------------------------- the transport with sparse columns


def similarity(seed=7, size=24, experts=4):
    """(E, S)."""
    return softmax(2 * scores(1, size, seed, experts)[0]).T


def projected(x_S, nonzeros):
    """The projection onto the simplex with at most this many nonzero entries, by bisection for the threshold."""
    kept = np.argsort(-x_S)[:nonzeros]
    low, high = x_S[kept].min() - 1, x_S.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x_S[kept] - middle, 0).sum() > 1 else (low, middle)
    out = np.zeros_like(x_S)
    out[kept] = np.maximum(x_S[kept] - low, 0)
    return out


def columns(similarity_ES, alpha_S, nonzeros):
    """The plan of these potentials, (E, S)."""
    mass = similarity_ES.shape[1] / len(similarity_ES)
    return np.stack([mass * projected((row + alpha_S) / mass, nonzeros) for row in similarity_ES])


def semi_dual(similarity_ES, alpha_S, nonzeros):
    """What the solver maximises, and its gradient."""
    plan = columns(similarity_ES, alpha_S, nonzeros)
    value = alpha_S.sum() - (plan * (similarity_ES + alpha_S)).sum() + (plan**2).sum() / 2
    return value, 1 - plan.sum(axis=0)


def solved(similarity_ES, nonzeros, iterations, ops=None, kind="float64", epsilon=1e-8):
    ops = ops or NumpyOps()
    x_GES = ops.cast(ops.from_numpy(similarity_ES[None]), kind)
    return ops.to_numpy(potentials(ops, x_GES, nonzeros, iterations, epsilon))[0, 0]


SOLVED = [(1.0, 11), (2.0, 12), (3.0, 13)]
"""Mean experts per token, and the seed of the similarities."""


@functools.cache
def by_optax(mean_experts, seed):
    """The potentials as the released code finds them: optax.adam(0.01), whose epsilon of 1e-8 is outside the root."""
    nonzeros, similarity_ES = math.ceil(mean_experts * 4), similarity(seed, size=32, experts=8)
    alpha, mean, square = np.zeros((3, 32))
    for step in range(1, 21):
        descent = -semi_dual(similarity_ES, alpha, nonzeros)[1]
        mean, square = 0.9 * mean + 0.1 * descent, 0.999 * square + 0.001 * descent**2
        alpha = alpha - 0.01 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return alpha


def tokens_taken(mean_experts, seed, alpha_S):
    """Of each expert."""
    x_ES = similarity(seed, size=32, experts=8) + alpha_S
    return [set(np.argsort(-row)[: math.ceil(mean_experts * 4)].tolist()) for row in x_ES]


@every_target
def test_all_choices_are_those_of_the_released_code(target):
    ops, kind = target.build().ops, "float64" if target.dtype == "float64" else "float32"
    for case in SOLVED:
        config = SparsityConstrainedExpertChoiceConfig(mean_experts=case[0])
        similarity_ES = similarity(case[1], size=32, experts=8)
        got = solved(similarity_ES, config.capacity(32, 8), 20, ops, kind, config.adam_epsilon)
        assert tokens_taken(*case, got) == tokens_taken(*case, by_optax(*case))


def test_the_former_epsilon_changes_choices():
    def with_former(mean_experts, seed):
        return solved(similarity(seed, size=32, experts=8), math.ceil(mean_experts * 4), 20, epsilon=0.01)

    assert any(tokens_taken(*case, with_former(*case)) != tokens_taken(*case, by_optax(*case)) for case in SOLVED)


@pytest.mark.parametrize(
    ("given", "epsilon"),
    [
        ({}, 1e-8),
        ({"solver_iterations": 10}, 1e-8),
        ({"mean_experts": 2.0, "group": "sequence", "solver_iterations": 20}, 1e-2),
        ({"mean_experts": 2.0, "group": "sequence", "solver_iterations": 20, "adam_epsilon": 1e-8}, 1e-8),
    ],
)
def test_what_an_earlier_version_wrote_keeps_its_epsilon(given, epsilon):
    config = SparsityConstrainedExpertChoiceConfig.model_validate(given)
    assert config.adam_epsilon == epsilon
    assert SparsityConstrainedExpertChoiceConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("nonzeros", [1, 3, 6, 24])
@every_target
def test_columns_are_projections_onto_the_sparse_simplex(target, nonzeros):
    ops = target.build().ops
    kind = "float64" if target.dtype == "float64" else "float32"
    for scale in (0.1, 1.0, 30.0):
        x_ES = scale * similarity()
        ids, t = sparse_columns(ops, ops.cast(ops.from_numpy(x_ES[None]), kind), nonzeros, 6.0)
        got = np.zeros_like(x_ES)
        np.put_along_axis(got, ops.to_numpy(ids)[0], ops.to_numpy(t)[0], axis=1)
        assert (np.count_nonzero(got, axis=1) <= nonzeros).all()
        assert_close(got, columns(x_ES, np.zeros(24), nonzeros), 10 * TOLERANCE[kind])


@pytest.mark.parametrize(("nonzeros", "error"), [(8, 0.3), (24, 1e-3)])
def test_the_semi_dual_rises_and_the_marginals_come_near(nonzeros, error):
    found = [semi_dual(similarity(), solved(similarity(), nonzeros, n), nonzeros) for n in (0, 5, 20, 100, 1000)]
    values, errors = [value for value, _ in found], [np.abs(gradient).mean() for _, gradient in found]
    assert values == sorted(values)
    assert errors[0] > errors[1] > errors[2]
    assert errors[4] < error


@pytest.mark.parametrize(("nonzeros", "rest"), [(8, 0.1), (24, 1e-3)])
def test_the_solver_approaches_the_best_that_scipy_finds(nonzeros, rest):
    """With fewer nonzero entries than tokens the semi-dual has kinks, around which a fixed learning rate swings."""
    optimize = pytest.importorskip("scipy.optimize")

    def loss(alpha_S):
        value, gradient = semi_dual(similarity(), alpha_S, nonzeros)
        return -value, -gradient

    best_value = -optimize.minimize(loss, np.zeros(24), jac=True, method="L-BFGS-B").fun
    start, few, many = (semi_dual(similarity(), solved(similarity(), nonzeros, n), nonzeros)[0] for n in (0, 20, 2000))
    assert best_value - few < 0.7 * (best_value - start)
    assert abs(best_value - many) < rest * (best_value - start)


def test_the_gradient_of_the_semi_dual_is_that_of_finite_differences():
    """Of the oracle, so that the tests above mean what they say."""
    alpha = 0.1 * rng(1).standard_normal(24)
    _, gradient = semi_dual(similarity(), alpha, 6)
    assert_gradient(gradient, finite_difference(lambda at: semi_dual(similarity(), at, 6)[0], alpha), 1e-13)


def test_an_expert_takes_the_nonzero_entries_of_its_column():
    config = SparsityConstrainedExpertChoiceConfig(mean_experts=1)
    logits_SE = 2 * scores(1, 24, 7, 4)[0]
    plan_ES = columns(similarity(), solved(similarity(), 6, 20), 6)
    got = taken(routed(config, logits_SE[None]))
    assert {(int(s), int(e)) for e, s in zip(*np.nonzero(plan_ES), strict=True)} <= got.keys()
    assert len(got) == 24


@every_target
def test_backends_find_the_same_potentials(target):
    kind = "float64" if target.dtype == "float64" else "float32"
    got = solved(similarity(), 6, 20, target.build().ops, kind)
    assert_close(got, solved(similarity(), 6, 20), 1e-9 if kind == "float64" else 1e-4)
