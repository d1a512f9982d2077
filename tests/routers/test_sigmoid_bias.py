import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.losses import chosen_counts, load_balance_loss
from moeport.core.routing import RouterContext, Routing
from moeport.routers import build_router
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from tests.conformance.targets import TOLERANCE, every_target
from tests.routers.examples import EXPERTS, WIDTH, choices, route
from tests.support import assert_close, rng

VARIANTS = [
    SigmoidBiasConfig(top_k=3, normalize_gates=False),
    SigmoidBiasConfig(top_k=1),
    SigmoidBiasConfig(num_groups=4, top_groups=2),
    SigmoidBiasConfig(num_groups=8, top_groups=3),
]
"""Further configs for the tests of all routers."""
LOGITS = np.array([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
SCORES = 1 / (1 + np.exp(-LOGITS[0]))


def routed(bias, logits=LOGITS, **options):
    experts = logits.shape[1]
    params = {"weight": np.eye(experts), "bias": np.array(bias, np.float64)}
    return choices(route(SigmoidBiasConfig(**options), params, logits, num_experts=experts))


def test_gates_are_normalised_sigmoids():
    experts, gates = routed(np.zeros(8), top_k=3)
    assert experts.tolist() == [[0, 1, 2]]
    assert_close(gates[0], SCORES[:3] / SCORES[:3].sum(), 1e-15)


def test_gates_without_normalisation_are_sigmoids():
    _, gates = routed(np.zeros(8), top_k=3, normalize_gates=False)
    assert_close(gates[0], SCORES[:3], 1e-15)


def test_a_single_gate_is_not_divided_by_itself():
    """s, as in Megatron-LM and DeepSeek's code, unless the gate of transformers is asked for."""
    _, gates = routed(np.zeros(8), top_k=1)
    assert_close(gates[0], SCORES[:1], 1e-15)
    _, gates = routed(np.zeros(8), top_k=1, normalize_single_gate=True)
    assert gates.tolist() == [[1.0]]


WRITTEN = {"normalize_gates": True, "num_groups": 1, "top_groups": 1, "bias_update_rate": 1e-3}
"""The keys that versions before normalize_single_gate wrote, besides the name and top_k."""


@pytest.mark.parametrize(
    ("given", "divides"),
    [
        ({"top_k": 1}, False),
        ({"top_k": 1, "normalize_gates": True}, False),
        ({"top_k": 1, **WRITTEN}, True),
        ({"top_k": 1, **WRITTEN, "normalize_gates": False}, False),
        ({"top_k": 1, **WRITTEN, "normalize_single_gate": False}, False),
        ({"top_k": 2, **WRITTEN}, False),
    ],
)
def test_what_an_earlier_version_wrote_keeps_its_single_gate(given, divides):
    config = SigmoidBiasConfig.model_validate(given)
    assert config.normalize_single_gate == divides
    assert SigmoidBiasConfig.model_validate(config.model_dump()) == config


def sequence_loss(scores_TE, top_k):
    """Equations 17 to 20 of DeepSeek-V3 without alpha, in the paper's own indices."""
    length, experts = scores_TE.shape
    total = 0.0
    for i in range(experts):
        f = p = 0.0
        for t in range(length):
            among_top_k = scores_TE[t, i] >= sorted(scores_TE[t], reverse=True)[top_k - 1]
            f += experts / (top_k * length) * among_top_k
            p += scores_TE[t, i] / sum(scores_TE[t]) / length
        total += f * p
    return total


@pytest.mark.parametrize(
    ("top_k", "options"), [(1, {}), (2, {"num_groups": 4, "top_groups": 2}), (3, {"normalize_gates": False})], ids=str
)
@every_target
def test_the_sequence_wise_loss_counts_scores_without_bias_and_groups(target, top_k, options):
    """Megatron-LM counts so too: compute_routing_scores_for_aux_loss."""
    backend = target.build()
    ops, sequences, tokens = backend.ops, 3, 8
    logits = rng(1).standard_normal((sequences * tokens, EXPERTS))
    router = build_router(SigmoidBiasConfig(top_k=top_k, **options), EXPERTS, EXPERTS)
    arrays = {"weight": np.eye(EXPERTS), "bias": np.linspace(-1, 1, EXPERTS)}
    params = {name: ops.cast(ops.from_numpy(value), backend.parameter_dtype) for name, value in arrays.items()}
    x_TD = ops.cast(ops.from_numpy(logits), backend.dtype)
    got = router.route(ops, params, x_TD, RouterContext(0, True))
    assert isinstance(got, Routing)
    scores = 1 / (1 + np.exp(-ops.to_numpy(x_TD).astype(np.float64)))
    pieces = [sequence_loss(scores[i : i + tokens], top_k) for i in range(0, len(scores), tokens)]
    chosen = ops.to_numpy(got.expert_N).reshape(len(scores), top_k)
    assert (np.sort(chosen) != np.sort(np.argsort(-scores)[:, :top_k])).any()
    accurate = "float64" if target.dtype == "float64" else "float32"
    assert_close(ops.to_numpy(load_balance_loss(ops, got, sequences)), np.mean(pieces), 4 * TOLERANCE[accurate])
    assert_close(
        ops.to_numpy(load_balance_loss(ops, got, 1, chosen_E=chosen_counts(ops, got.expert_N, EXPERTS))),
        sequence_loss(scores, top_k),
        4 * TOLERANCE[accurate],
    )


def test_the_bias_changes_the_choice_but_not_the_gates():
    bias = np.where(np.arange(8) == 7, 2.0, 0.0)
    experts, gates = routed(bias, top_k=2, normalize_gates=False)
    assert experts.tolist() == [[7, 0]]
    assert_close(gates[0], SCORES[[7, 0]], 1e-15)


def test_the_choice_stays_inside_the_best_groups():
    """Groups of two: (0, 1), (2, 3), (4, 5), (6, 7), ranked by the sum of their two best biased scores."""
    bias = [-4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    experts, _ = routed(bias, top_k=3, num_groups=4, top_groups=2)
    selection = SCORES + bias
    sums = selection.reshape(4, 2).sum(axis=1)
    assert set(np.argsort(-sums)[:2]) == {1, 3}
    inside = sorted([2, 3, 6, 7], key=lambda e: -selection[e])
    assert experts.tolist() == [inside[:3]]
    assert int(np.argmax(selection)) in {1, 6}


def test_groups_of_three_count_their_two_best():
    """The group with the best single expert loses to the one with the better pair."""
    scores = np.array([[0.9, 0.1, 0.1, 0.6, 0.6, 0.0001]])
    experts, _ = routed(np.zeros(6), np.log(scores / (1 - scores)), top_k=2, num_groups=2, top_groups=1)
    assert experts.tolist() == [[3, 4]]


@pytest.mark.parametrize(("groups", "top_groups"), [(2, 1), (4, 2), (4, 3), (8, 5)])
def test_the_group_limit_holds_for_many_tokens(groups, top_groups):
    logits = rng(1).standard_normal((200, 8))
    experts, _ = routed(rng(2).standard_normal(8) / 4, logits, top_k=2, num_groups=groups, top_groups=top_groups)
    selection = 1 / (1 + np.exp(-logits)) + rng(2).standard_normal(8) / 4
    for chosen, scores in zip(experts.tolist(), selection, strict=True):
        pairs = [sorted(group, reverse=True)[:2] for group in scores.reshape(groups, -1).tolist()]
        best = sorted(range(groups), key=lambda group: -sum(pairs[group]))[:top_groups]
        allowed = [expert for expert in range(8) if expert // (8 // groups) in best]
        assert chosen == sorted(allowed, key=lambda expert: -scores[expert])[:2]


def test_as_many_groups_as_there_are_is_no_limit():
    logits, bias = rng(1).standard_normal((50, 8)), np.zeros(8)
    limited = routed(bias, logits, num_groups=4, top_groups=4)
    free = routed(bias, logits)
    assert limited[0].tolist() == free[0].tolist()


def router(**options):
    return build_router(SigmoidBiasConfig(**options), WIDTH, EXPERTS)


def test_overloaded_experts_move_down_and_idle_ones_up():
    load_E = np.array([10, 4, 4, 4, 4, 4, 2, 0])
    state = {"bias": np.full(EXPERTS, 0.5, np.float32)}
    new = router(bias_update_rate=0.25).update_state(state, load_E)
    assert new["bias"].tolist() == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75, 0.75]
    assert new["bias"].dtype == np.float32
    assert state["bias"].tolist() == [0.5] * EXPERTS


def test_balanced_loads_change_nothing():
    state = {"bias": np.arange(EXPERTS, dtype=np.float32)}
    assert router().update_state(state, np.full(EXPERTS, 3))["bias"].tolist() == list(range(EXPERTS))


def test_repeated_updates_balance_skewed_tokens():
    config = SigmoidBiasConfig(bias_update_rate=0.01)
    logits = rng(3).standard_normal((500, EXPERTS)) + np.linspace(-1, 1, EXPERTS)
    state = {"bias": np.zeros(EXPERTS, np.float32)}

    def loads():
        params = {"weight": np.eye(EXPERTS), "bias": state["bias"]}
        return chosen_counts(NumpyOps(), route(config, params, logits).expert_N, EXPERTS)

    before = loads()
    for _ in range(100):
        state = router(bias_update_rate=0.01).update_state(state, loads())
    after, mean = loads(), 2 * 500 / EXPERTS
    assert before.max() > 1.7 * mean
    assert after.max() < 1.1 * mean
    assert after.min() > 0.9 * mean


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"top_k": 9}, ("top_k", "more experts per token than there are", "at most model.moe.num_experts (8)")),
        (
            {"num_groups": 3},
            ("num_groups", "does not divide the experts", "a divisor of model.moe.num_experts (8)"),
        ),
        ({"num_groups": 2, "top_groups": 3}, ("top_groups", "more groups than there are", "at most num_groups (2)")),
        (
            {"top_k": 5, "num_groups": 4, "top_groups": 2},
            ("top_k", "more experts per token than its groups hold", "at most 4"),
        ),
    ],
)
def test_problems(options, problem):
    assert SigmoidBiasConfig(**options).problems(8) == [problem]


@pytest.mark.parametrize("options", [{}, {"top_k": 8}, {"top_k": 4, "num_groups": 4, "top_groups": 2}])
def test_no_problems(options):
    assert SigmoidBiasConfig(**options).problems(8) == []
