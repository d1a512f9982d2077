import functools
from typing import Any

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.losses import chosen_counts, load_balance_loss, weighted_cross_entropy, z_loss
from moeport.routers.forced import ForcedBalanceConfig
from moeport.routers.topk import TopKConfig
from tests.conformance.targets import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    Target,
    every_accurate_training_target,
    every_target,
)
from tests.core.routings import routing_of
from tests.routers.catalogue import CONFIGS
from tests.routers.examples import (
    EXPERTS,
    build,
    hidden_states,
    label,
    placed_context,
    route,
    router_params,
    trained_weight,
)
from tests.support import assert_close, assert_gradient, finite_difference, grid, rng, sampled

TOKENS = 12
TRAINED = [config for config in CONFIGS if config.experts_per_token < EXPERTS and trained_weight(build(config))]
"""Routers that have a weight and a choice."""


def naive(routing, tokens=slice(None)):
    """E * sum_e f_e P_e over some tokens; null experts share the choices that are unrouted."""
    experts, counted, nulls = routing.num_experts, routing.balanced_choices, routing.null_experts
    chosen = routing.expert_N.reshape(routing.num_tokens, -1)[tokens, :counted]
    probs = routing.probs_TE[tokens]
    if routing.balances_scores:
        chosen = np.argsort(-probs, axis=1, kind="stable")[:, :counted]
    total = 0.0
    for expert in range(experts + nulls):
        share = sum(row.count(min(expert, experts)) for row in chosen.tolist()) / (len(chosen) * counted)
        share /= nulls if expert >= experts else 1
        total += share * sum(probs[:, expert].tolist()) / len(probs)
    return (experts + nulls) * total


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize("num_sequences", [1, 3, TOKENS])
def test_load_balance_loss_is_the_mean_of_each_sequence(config, num_sequences):
    routing = route(config)
    length = TOKENS // num_sequences
    pieces = [naive(routing, slice(start, start + length)) for start in range(0, TOKENS, length)]
    assert len(pieces) == num_sequences
    assert_close(load_balance_loss(NumpyOps(), routing, num_sequences), np.mean(pieces), 1e-14)


@pytest.mark.parametrize("choices", [1, 2])
@every_target
def test_perfect_balance_is_one(target, choices):
    ops = target.build().ops
    experts = np.array([[(token + choice) % 4 for choice in range(choices)] for token in range(8)])
    routing = routing_of(ops, experts, np.ones_like(experts), 4, target.dtype, probs_TE=np.full((8, 4), 0.25))
    for num_sequences in (1, 2):
        assert ops.to_numpy(load_balance_loss(ops, routing, num_sequences)) == 1.0


def test_all_tokens_on_one_expert_cost_the_number_of_experts():
    probs_TE = np.eye(4)[[2] * 6]
    routing = routing_of(NumpyOps(), [[2]] * 6, np.ones((6, 1)), 4, probs_TE=probs_TE)
    assert load_balance_loss(NumpyOps(), routing, 1) == 4.0


def test_assignments_to_nowhere_are_counted_for_no_expert():
    assert np.asarray(chosen_counts(NumpyOps(), np.array([3, 0, 3, 1, 0]), 3)).tolist() == [2, 1, 0]


def test_z_loss_is_the_mean_square():
    assert z_loss(NumpyOps(), np.array([1.0, -2.0, 4.0])) == 7.0


LOSSES = {
    "load balance": lambda ops, routing: load_balance_loss(ops, routing, 3),
    "router z": lambda ops, routing: z_loss(ops, ops.logsumexp(routing.logits_TE)),
}


@functools.cache
def slopes_by_weight(config, loss):
    """Of a loss by some of the router's weight, from numpy in float64."""
    params = router_params(build(config))
    places = sampled(params["weight"].shape)

    def moved(values):
        weight = params["weight"].copy()
        weight[places] = values
        return float(loss(NumpyOps(), route(config, params | {"weight": weight})))

    return finite_difference(moved, params["weight"][places])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("config", TRAINED, ids=label)
@every_accurate_training_target
def test_the_gradient_reaches_the_router_weight(target, config, loss):
    backend, router = target.build(), build(config)
    ops = backend.ops
    params = {k: ops.cast(ops.from_numpy(v), target.dtype) for k, v in router_params(router).items()}
    x_TD = ops.cast(ops.from_numpy(hidden_states()), target.dtype)

    def total(inputs):
        return loss(ops, router.route(ops, {**params, **inputs}, x_TD, placed_context(ops, router)))

    _, grads = backend.value_and_grad(total)({"weight": params["weight"]})
    want = slopes_by_weight(config, loss)
    even = isinstance(config, ForcedBalanceConfig) and TOKENS // 3 * config.top_k % EXPERTS == 0
    assert np.abs(want.value).max() > 1e-3 or (even and loss is LOSSES["load balance"])
    gradient = ops.to_numpy(grads["weight"])
    assert_gradient(gradient[sampled(gradient.shape)], want, GRADIENT_TOLERANCE[target.dtype])


def test_z_loss_of_the_router_is_that_of_its_logits():
    logits = rng(1).standard_normal((7, 5))
    routing = route(TopKConfig(), {"weight": np.eye(5)}, logits, num_experts=5)
    want = np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits])
    assert_close(LOSSES["router z"](NumpyOps(), routing), want, 1e-14)


WEIGHTS = [0, 1.75, 0, 1.75, 1.75, 0, 0, 0, 1.75, 0, 0, 1.75]
"""Of the tokens of a part of a step, in which the mean is not 1."""


def head_inputs():
    """(hidden states, projection, targets) of 12 tokens and 7 ids."""
    return grid(1, TOKENS, 5), grid(2, 7, 5), rng(3).integers(7, size=TOKENS)


@every_target
def test_weighted_cross_entropy_counts_what_has_a_weight(target):
    x, head, ids = head_inputs()
    backend = target.build()
    ops, weights = backend.ops, np.array(WEIGHTS, np.float32)
    x_TD, head_VD = (ops.cast(ops.from_numpy(array), target.dtype) for array in (x, head))
    found = weighted_cross_entropy(ops, x_TD, head_VD, ops.from_numpy(ids), ops.from_numpy(weights), 0.1)
    nats_T, squares = [], 0.0
    for token, weight in enumerate(WEIGHTS):
        logits = [sum(a * b for a, b in zip(x[token], row, strict=True)) for row in head]
        log_partition = np.log(np.sum(np.exp(logits)))
        nats_T.append(weight * (log_partition - logits[ids[token]]))
        squares += weight * log_partition**2 / TOKENS
    for got, want in zip(found, (np.mean(nats_T) + 0.1 * squares, np.array(nats_T), squares), strict=True):
        assert_close(ops.to_numpy(got), want, 4 * TOLERANCE[target.dtype])


def test_the_gradient_of_weighted_cross_entropy_is_that_of_torch():
    torch = pytest.importorskip("torch")
    ops = Target("torch", "cpu", "float64").build().ops
    x, head, ids = (torch.from_numpy(array) for array in head_inputs())
    weights = torch.tensor(WEIGHTS)
    own, other = ([array.clone().requires_grad_() for array in (x, head)] for _ in range(2))
    loss: Any = weighted_cross_entropy(ops, own[0], own[1], ids, weights, 0.0)[0]
    loss.backward()
    ignored = torch.where(weights > 0, ids, -100)
    total = torch.nn.functional.cross_entropy(other[0] @ other[1].T, ignored, reduction="sum")
    (total * 1.75 / TOKENS).backward()
    for got, want in zip(own, other, strict=True):
        assert_close(got.grad.numpy(), want.grad.numpy(), 1e-13)


def test_tokens_without_weight_give_no_loss():
    x, head, ids = head_inputs()
    found = weighted_cross_entropy(NumpyOps(), x, head, ids, np.zeros(TOKENS, np.float32), 0.1)
    assert [np.asarray(each).tolist() for each in found] == [0, [0] * TOKENS, 0]
