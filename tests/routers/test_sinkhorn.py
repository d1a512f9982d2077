import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance.formulas import softmax
from moeport.core.losses import chosen_counts
from moeport.routers.sinkhorn import SinkhornTokenChoiceConfig, sinkhorn_log_plan
from moeport.routers.topk import TopKConfig
from tests.conformance.targets import TOLERANCE, every_target
from tests.routers.examples import choices, logits_as_tokens, route
from tests.support import assert_close, rng

VARIANTS = [SinkhornTokenChoiceConfig(top_k=1, sinkhorn_iterations=3)]
"""Further configs for the tests of all routers."""
TOKENS, EXPERTS = 64, 8
LOGITS = rng(1).standard_normal((TOKENS, EXPERTS)) + np.linspace(-2, 2, EXPERTS)


def scaled(logits_TE, iterations):
    """The plan by scaling exp(logits): Cuturi 2013, arXiv 1306.0895, Algorithm 1."""
    tokens, experts = logits_TE.shape
    kernel, columns = np.exp(logits_TE), np.ones(experts)
    for _ in range(iterations):
        rows = 1 / (kernel @ columns)
        columns = tokens / experts / (kernel.T @ rows)
    return rows[:, None] * kernel * columns


@pytest.mark.parametrize("iterations", [1, 2, 20])
@every_target
def test_the_plan_is_that_of_scaling_the_kernel(target, iterations):
    ops = target.build().ops
    kind = "float64" if target.dtype == "float64" else "float32"
    logits = ops.cast(ops.from_numpy(LOGITS), kind)
    got = np.exp(ops.to_numpy(sinkhorn_log_plan(ops, logits, iterations)))
    assert_close(got, scaled(LOGITS, iterations), 10 * TOLERANCE[kind])


def test_rows_sum_to_one_and_columns_to_the_mean_load():
    errors = []
    for iterations in (1, 20, 100):
        plan = np.exp(np.asarray(sinkhorn_log_plan(NumpyOps(), LOGITS, iterations)))
        assert_close(plan.sum(axis=0), np.full(EXPERTS, TOKENS / EXPERTS), 1e-13)
        errors.append(np.abs(plan.sum(axis=1) - 1).max())
    assert errors[0] > 0.1
    assert errors[1] < 1e-6
    assert errors[2] < 1e-12


def test_logits_that_underflow_in_the_kernel_are_no_problem():
    skewed = LOGITS.astype(np.float32) - np.float32(400) * (np.arange(8) == 3)
    plan = np.asarray(sinkhorn_log_plan(NumpyOps(), skewed, 5))
    assert np.isfinite(plan).all()
    assert_close(np.exp(plan).sum(axis=0), np.full(EXPERTS, TOKENS / EXPERTS), 1e-4)


def routed(k, training):
    return route(SinkhornTokenChoiceConfig(top_k=k), *logits_as_tokens(LOGITS), training=training)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_training_chooses_from_the_plan_and_weighs_by_the_softmax(k):
    experts, gates = choices(routed(k, training=True))
    assert experts.tolist() == np.argsort(-scaled(LOGITS, 20), axis=1)[:, :k].tolist()
    assert_close(gates, [softmax(row)[chosen] for row, chosen in zip(LOGITS, experts, strict=True)], 1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_evaluation_is_plain_top_k(k):
    want = route(TopKConfig(top_k=k, normalize_gates=False), *logits_as_tokens(LOGITS))
    got = routed(k, training=False)
    assert got.expert_N.tolist() == want.expert_N.tolist() != routed(k, training=True).expert_N.tolist()
    assert got.weight_N.tolist() == want.weight_N.tolist()


def test_the_plan_balances_skewed_tokens():
    plain, planned = (
        np.asarray(chosen_counts(NumpyOps(), routed(1, training).expert_N, EXPERTS)) for training in (False, True)
    )
    assert plain.max() > 3 * TOKENS / EXPERTS
    assert planned.max() < 1.7 * TOKENS / EXPERTS
    assert planned.min() > 0.4 * TOKENS / EXPERTS


def test_more_choices_than_experts_are_a_problem():
    assert SinkhornTokenChoiceConfig(top_k=4).problems(4) == []
    assert SinkhornTokenChoiceConfig(top_k=5).problems(4) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (4)")
    ]
