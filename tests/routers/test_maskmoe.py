from dataclasses import replace

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.conformance.formulas import softmax
from moeport.core.losses import load_balance_loss
from moeport.core.parameters import generator
from moeport.routers import build_router
from moeport.routers.hash import HashConfig
from moeport.routers.maskmoe import MaskMoEConfig, MaskMoERouter, most_frequent
from moeport.routers.topk import TopKConfig
from tests.conformance.targets import every_training_target
from tests.routers.examples import (
    EXPERTS,
    TOKEN_COUNTS,
    WIDTH,
    build,
    choices,
    context,
    hidden_states,
    placed_context,
    route,
    router_params,
    token_ids,
)
from tests.support import assert_close, grid, rng

VARIANTS = [MaskMoEConfig(top_k=3, visible_infrequent=2, visible_frequent=6)]
"""Further configs for the tests of all routers."""
MASKED = MaskMoEConfig(top_k=3, visible_infrequent=2, visible_frequent=5)


def test_gates_are_those_of_a_loop_over_visible_experts():
    params = router_params(build(MASKED))
    routing = route(MASKED, params)
    logits_TE = hidden_states() @ params["weight"].T
    assert_close(routing.logits_TE, logits_TE, 1e-13)
    for token, (experts, gates) in enumerate(zip(*choices(routing), strict=True)):
        visible = np.flatnonzero(params["visible"][token_ids()[token]])
        best = sorted(visible, key=(-logits_TE[token]).__getitem__)[:3]
        assert experts.tolist() == best + [EXPERTS] * (3 - len(best))
        probs = softmax(logits_TE[token][visible])
        assert_close(routing.probs_TE[token][visible], probs, 1e-13)
        assert routing.probs_TE[token].sum() == pytest.approx(1)
        chosen = np.array([probs[list(visible).index(expert)] for expert in best])
        assert_close(gates[: len(best)], chosen / chosen.sum(), 1e-13)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@every_training_target
def test_with_all_experts_visible_it_is_topk_exactly(target, top_k):
    """Values and gradients."""
    backend = target.build()
    ops = backend.ops
    masked = build(MaskMoEConfig(top_k=top_k, visible_infrequent=EXPERTS))
    plain = build_router(TopKConfig(top_k=top_k), WIDTH, EXPERTS)
    params = router_params(masked)
    assert (params["visible"] == 1).all()
    placed = {k: ops.cast(ops.from_numpy(v), backend.parameter_dtype) for k, v in params.items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), target.dtype)
    weights = ops.cast(ops.from_numpy(grid(1, len(hidden_states()) * top_k)), backend.parameter_dtype)

    def chosen(inputs, router):
        return router.route(ops, placed | {"weight": inputs["weight"]}, inputs["x"], placed_context(ops, router))

    def total(inputs, router):
        routing = chosen(inputs, router)
        loss = ops.sum(routing.weight_N * weights) + load_balance_loss(ops, routing, 1)
        return loss + ops.sum(ops.logsumexp(routing.logits_TE))

    inputs = {"weight": placed["weight"], "x": x_TD}
    got, want = chosen(inputs, masked), chosen(inputs, plain)
    for name in ("expert_N", "weight_N", "logits_TE", "probs_TE"):
        np.testing.assert_array_equal(ops.to_numpy(getattr(got, name)), ops.to_numpy(getattr(want, name)))
    (loss, grads), (other, other_grads) = (backend.value_and_grad(total)(inputs, router) for router in (masked, plain))
    assert ops.to_numpy(loss) == ops.to_numpy(other)
    for name, grad in grads.items():
        np.testing.assert_array_equal(ops.to_numpy(grad), ops.to_numpy(other_grads[name]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_with_one_visible_expert_it_is_hash_routing(top_k):
    """The same draw, the same experts, gates of exactly 1, whatever the hidden states."""
    config = MaskMoEConfig(top_k=top_k, visible_frequent=1)
    masked, hashed = build(replaced(config, frequent_share=0.0)), build(HashConfig())
    visible = masked._drawn(generator(0), TOKEN_COUNTS)
    table = hashed._drawn(generator(0), TOKEN_COUNTS)
    assert visible.argmax(axis=1).tolist() == table[:, 0].tolist()
    assert visible.sum(axis=1).tolist() == [1] * len(TOKEN_COUNTS)
    params = router_params(masked) | {"visible": visible}
    fixed = choices(route(HashConfig(), {"experts": table.astype(float)}))[0]
    for seed in (10, 11):
        experts, gates = choices(route(config, params, hidden_states(seed)))
        assert experts[:, :1].tolist() == fixed.tolist()
        assert (gates[:, 0] == 1).all()
        assert (experts[:, 1:] == EXPERTS).all()
        assert (gates[:, 1:] == 0).all()


def replaced(config, **values):
    return config.model_copy(update=values)


def test_frequent_ids_are_the_fewest_that_make_up_the_share():
    counts = np.array([5, 60, 5, 20, 10])
    wanted = {0.0: [], 0.5: [1], 0.6: [1], 0.61: [1, 3], 0.9: [1, 3, 4], 0.95: [0, 1, 3, 4], 1.0: [0, 1, 2, 3, 4]}
    for share, ids in wanted.items():
        assert np.flatnonzero(most_frequent(counts, share)).tolist() == ids
    assert most_frequent(np.array([3, 0, 1]), 1.0).tolist() == [True, False, True]


def test_frequent_ids_see_more():
    counts = rng(0).permutation(1_000_000 // np.arange(1, 3001))
    router = MaskMoERouter(MASKED, WIDTH, EXPERTS, vocab_size=3000)
    visible = router._drawn(generator(0), counts)
    assert set(visible.sum(axis=1)) == {2, 5}
    assert counts[visible.sum(axis=1) == 5].min() >= counts[visible.sum(axis=1) == 2].max()
    assert 0.8 <= counts[visible.sum(axis=1) == 5].sum() / counts.sum() < 0.801


def test_infrequent_ids_load_the_experts_evenly():
    counts = rng(0).permutation(1_000_000 // np.arange(1, 3001))
    visible = MaskMoERouter(MaskMoEConfig(), WIDTH, EXPERTS, vocab_size=3000)._drawn(generator(0), counts)
    fixed = visible.sum(axis=1) == 1
    load = counts[fixed] @ visible[fixed]
    assert load.max() / load.mean() < 1.001


@pytest.mark.parametrize("config", [MASKED, MaskMoEConfig(visible_frequent=1)])
@every_training_target
def test_masks_leave_everything_finite(target, config):
    """Forward and backward, through the gates, the balance loss and the z-loss."""
    backend = target.build()
    ops, router = backend.ops, build(config)
    params = {k: ops.cast(ops.from_numpy(v), backend.parameter_dtype) for k, v in router_params(router).items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), target.dtype)

    def total(inputs):
        routing = router.route(ops, params | {"weight": inputs["weight"]}, inputs["x"], placed_context(ops, router))
        loss = ops.sum(routing.weight_N * routing.weight_N) + load_balance_loss(ops, routing, 1)
        return loss + ops.sum(ops.logsumexp(routing.logits_TE))

    loss, grads = backend.value_and_grad(total)({"weight": params["weight"], "x": x_TD})
    assert np.isfinite(ops.to_numpy(loss))
    assert all(np.isfinite(ops.to_numpy(grad)).all() for grad in grads.values())


def test_masked_experts_do_not_count_in_the_balance_loss():
    routing, visible = route(MASKED), router_params(build(MASKED))["visible"][token_ids()]
    assert ((routing.probs_TE == 0) == (visible == 0)).all()


def test_a_change_of_a_masked_experts_weight_changes_no_gate():
    router = build(MaskMoEConfig(visible_frequent=4))
    params = router_params(router)
    only = replace(context(router), token_ids_T=np.full(12, 3))
    hidden = np.flatnonzero(params["visible"][3] == 0)
    moved = params | {"weight": params["weight"] + 100 * np.isin(np.arange(EXPERTS), hidden)[:, None]}
    before, after = (router.route(NumpyOps(), p, hidden_states(), only) for p in (params, moved))
    assert before.weight_N.tolist() == after.weight_N.tolist()
    assert before.expert_N.tolist() == after.expert_N.tolist()


def test_problems():
    assert MaskMoEConfig(top_k=4, visible_infrequent=4, visible_frequent=4).problems(4) == []
    assert MaskMoEConfig(top_k=5, visible_infrequent=6, visible_frequent=7).problems(4) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (4)"),
        ("visible_infrequent", "more visible experts than there are", "at most model.moe.num_experts (4)"),
        ("visible_frequent", "more visible experts than there are", "at most model.moe.num_experts (4)"),
    ]
