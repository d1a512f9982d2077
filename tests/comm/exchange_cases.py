"""The all-to-all algorithms of experts against one process that has them all; see `moeport.comm.exchange`."""

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.core.dispatch import combine, dispatch
from moeport.core.routing import Routing
from tests.support import rng

WIDTH, HIDDEN, TOKENS, CHOICES = 3, 4, 7, 3
CHUNKS = (1, 3)
"""Some of three parts of one token have none."""


def routings(size, num_experts):
    """Name to (experts of rank, tokens of rank): who goes where, on each rank."""

    def spread(rank, tokens=TOKENS):
        return np.stack([rng(100 + rank).permutation(num_experts)[:CHOICES] for _ in range(tokens)])

    def some_unrouted(rank):
        experts = spread(rank)
        return np.where(rng(200 + rank).random(experts.shape) < 0.4, num_experts, experts)

    one = np.stack([np.minimum(np.arange(CHOICES), num_experts)] * TOKENS)
    return {
        "spread": [spread(rank) for rank in range(size)],
        "other numbers of tokens": [spread(rank, 1 + 3 * rank) for rank in range(size)],
        "some unrouted": [some_unrouted(rank) for rank in range(size)],
        "all unrouted": [np.full((TOKENS, CHOICES), num_experts) for _ in range(size)],
        "all to the first experts": [one for _ in range(size)],
        "all to the last expert": [np.full((TOKENS, 1), num_experts - 1) for _ in range(size)],
        "one rank sends nothing": [np.where(rank == 0, num_experts, spread(rank)) for rank in range(size)],
    }


def routing_of(ops, expert_TK, weight_TK, num_experts):
    scores_TE = ops.zeros((len(expert_TK), num_experts), ops.dtype(weight_TK))
    return Routing(
        expert_N=ops.from_numpy(expert_TK.reshape(-1)),
        weight_N=ops.reshape(weight_TK, (-1,)),
        num_tokens=len(expert_TK),
        num_experts=num_experts,
        logits_TE=scores_TE,
        probs_TE=scores_TE,
        balanced_choices=expert_TK.shape[1],
    )


def every(groups):
    """The whole product: (algorithm, group, chunks)."""
    return [(algorithm, group, chunks) for group in groups for algorithm in EXCHANGES for chunks in CHUNKS]


def in_parts(groups):
    """Every algorithm in several parts, and in one part that which stands between the other two."""
    return [one for one in every(groups) if one[0] == "hierarchical" or one[2] > 1]


def sample(groups):
    """Every algorithm in one part and in several on the last of the groups; on the others, in several parts, the
    algorithms that ask where the nodes are.
    """
    *others, last = groups
    return every([last]) + [(name, group, CHUNKS[-1]) for group in others for name in EXCHANGES if name != "flat"]


def check(chosen, backend, experts_a_rank, names=None):
    """Outputs, and gradients of tokens, gates and experts, in float64.

    `chosen`: (algorithm, group, chunks); the groups have the same ranks, laid out on nodes in different ways, and the
    one process is computed once for all. `names`: of the routings; None: all.
    """
    _, group, _ = chosen[0]
    ops, size, rank = backend.ops, group.size, group.rank
    num_experts = experts_a_rank * size
    w_in, w_out = (
        rng(1).standard_normal((num_experts, HIDDEN, WIDTH)),
        rng(2).standard_normal((num_experts, WIDTH, HIDDEN)),
    )
    exchanges = [
        (
            f"{algorithm} on {len(set(group.nodes))} nodes in {chunks} chunks",
            group,
            EXCHANGES[algorithm](group, num_experts, chunks),
        )
        for algorithm, group, chunks in chosen
    ]
    mine = slice(rank * experts_a_rank, (rank + 1) * experts_a_rank)
    cases = routings(size, num_experts)
    for name in names or cases:
        experts = cases[name]
        tokens = [rng(10 + r).standard_normal((len(experts[r]), WIDTH)) for r in range(size)]
        gates = [np.where(experts[r] < num_experts, rng(20 + r).random(experts[r].shape), 0.0) for r in range(size)]
        mixing = [rng(30 + r).standard_normal((len(experts[r]), WIDTH)) for r in range(size)]

        def alone(params, experts=experts, mixing=mixing):
            total = None
            for r in range(size):
                routing = routing_of(ops, experts[r], params[f"gates.{r}"], num_experts)
                x_RD, counts_E, plan = dispatch(ops, params[f"tokens.{r}"], routing)
                y_RD = ops.grouped_mlp(x_RD, params["w_in"], params["w_out"], counts_E, "gelu")
                part = ops.sum(combine(ops, y_RD, routing, plan) * ops.from_numpy(mixing[r]))
                total = part if total is None else total + part
            return total

        def together(params, exchange, experts=experts, mixing=mixing):
            routing = routing_of(ops, experts[rank], params["gates"], num_experts)
            y_TD = exchange(
                ops,
                params["tokens"],
                routing,
                lambda x_RD, counts: ops.grouped_mlp(x_RD, params["w_in"], params["w_out"], counts, "gelu"),
            )
            return ops.sum(y_TD * ops.from_numpy(mixing[rank]))

        served = experts[rank] < num_experts
        whole = {"w_in": w_in, "w_out": w_out}
        whole |= {f"tokens.{r}": tokens[r] for r in range(size)} | {f"gates.{r}": gates[r] for r in range(size)}
        part = {"w_in": w_in[mine], "w_out": w_out[mine], "tokens": tokens[rank], "gates": gates[rank]}
        loss, gradients = backend.value_and_grad(alone)({k: ops.from_numpy(v) for k, v in whole.items()})
        want = {
            "w_in": ops.to_numpy(gradients["w_in"])[mine],
            "w_out": ops.to_numpy(gradients["w_out"])[mine],
            "tokens": ops.to_numpy(gradients[f"tokens.{rank}"]),
            "gates": np.where(served, ops.to_numpy(gradients[f"gates.{rank}"]), 0.0),
        }
        for label, group, exchange in exchanges:
            params = {k: ops.from_numpy(v) for k, v in part.items()}
            got_loss, got = backend.value_and_grad(together)(params, exchange)
            total = group.all_reduce(ops.reshape(got_loss, (1,)))
            where = f"{label}, {experts_a_rank} experts a rank, {name}"
            np.testing.assert_allclose(ops.to_numpy(total)[0], ops.to_numpy(loss), atol=1e-12, err_msg=where)
            for key, value in want.items():
                gradient = ops.to_numpy(got[key])
                if key == "gates":
                    gradient = np.where(served, gradient, 0.0)
                np.testing.assert_allclose(gradient, value, atol=1e-12, err_msg=f"{where}, {key}")
