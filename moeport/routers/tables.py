"""Routing by vocabulary id, with tables that are built before training and never change."""

from __future__ import annotations

import heapq
from typing import ClassVar

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec, TokenTable
from moeport.core.routing import RouterContext, Routing
from moeport.errors import UserError
from moeport.routers.base import ConfigT, Router, RouterConfig, assign


class TableRouterConfig(RouterConfig):
    """A router that looks up vocabulary ids and trains nothing."""

    needs_token_ids: ClassVar[bool] = True

    @property
    def experts_per_token(self) -> int:
        """1."""
        return 1

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """None."""
        return 0


class TableRouter(Router[ConfigT]):
    """A router with a table indexed by vocabulary id."""

    def table(self, name: str, columns: int, init: TokenTable) -> ParameterSpec:
        """The table (V, columns), untrained.

        Raises UserError if the vocabulary size is not known.
        """
        if self.vocab_size is None:
            raise UserError(
                f"router {self.config.name} needs the number of vocabulary ids for its table; expected vocab_size, "
                "such as MoE(..., vocab_size=32000), or a router that does not look at ids"
            )
        return ParameterSpec(name, (self.vocab_size, columns), init, trainable=False)


def balanced_table(
    random: np.random.Generator, counts_V: np.ndarray, num_experts: int, experts_per_id: int
) -> np.ndarray:
    """Experts (V, experts_per_id) of each id, so that all experts get the same number of tokens (arXiv 2106.04426).

    Ids in descending order of frequency get the experts with the fewest tokens so far; a token counts once for each of
    its experts. Ties are broken at random. Ids that never occur come last and count as if they occurred once, so that
    they spread too.
    """
    if experts_per_id == num_experts:
        return np.tile(np.arange(num_experts), (len(counts_V), 1))
    order_V = np.lexsort((random.random(len(counts_V)), -counts_V))
    loads = [(0, tie, expert) for expert, tie in enumerate(random.permutation(num_experts).tolist())]
    heapq.heapify(loads)
    ties = iter(random.random(len(counts_V) * experts_per_id).tolist())
    table = np.empty((len(counts_V), experts_per_id), np.int64)
    for token_id in order_V:
        emptiest = [heapq.heappop(loads) for _ in range(experts_per_id)]
        table[token_id] = [expert for _, _, expert in emptiest]
        for load, _, expert in emptiest:
            heapq.heappush(loads, (load + max(int(counts_V[token_id]), 1), next(ties), expert))
    return table


def random_table(random: np.random.Generator, counts_V: np.ndarray, num_experts: int) -> np.ndarray:
    """An expert (V, 1) for each id, uniform and independent of the counts."""
    return random.integers(num_experts, size=(len(counts_V), 1))


def experts_at(ops: Ops, table_VK: Array, ids_T: Array, num_experts: int) -> Array:
    """Rows of a table of experts as indices, (T, K). `Ops` has no cast to the index type, so the value is looked up."""
    number_N1 = ops.reshape(ops.take_rows(table_VK, ids_T), (-1, 1))
    number_1E = ops.reshape(ops.cast(ops.arange(num_experts), ops.dtype(number_N1)), (1, -1))
    one, zero = ops.constant_like(1.0, number_N1), ops.constant_like(0.0, number_N1)
    expert_N1 = ops.topk_ids(ops.where(number_N1 == number_1E, one, zero), 1)
    return ops.reshape(expert_N1, (-1, table_VK.shape[1]))


def ids_of(context: RouterContext) -> Array:
    """Vocabulary ids (T,) for a router whose config says that it needs them."""
    assert context.token_ids_T is not None
    return context.token_ids_T


def first_ids(ops: Ops, context: RouterContext, num_tokens: int) -> Array:
    """The id of the first token of each token's sequence, (T,)."""
    if context.first_id_T is not None:
        return context.first_id_T
    return ops.take_rows(ids_of(context), _first(ops, context, num_tokens))


def domains(ops: Ops, context: RouterContext, num_tokens: int) -> Array:
    """The number of the domain of each token's sequence, (T,); 0 where it is not known."""
    token_T = ops.arange(num_tokens)
    if context.domain_B is None:
        return token_T * ops.index(0)
    return ops.take_rows(context.domain_B, token_T // ops.index(num_tokens // context.num_sequences))


def position(ops: Ops, context: RouterContext, num_tokens: int) -> Array:
    """Each token's position in its sequence, from 0, (T,)."""
    if context.position_T is not None:
        return context.position_T
    return ops.arange(num_tokens) - _first(ops, context, num_tokens)


def _first(ops: Ops, context: RouterContext, num_tokens: int) -> Array:
    """The index of the first token of each token's sequence, (T,)."""
    length = ops.index(num_tokens // context.num_sequences)
    return ops.arange(num_tokens) // length * length


def fixed_routing(ops: Ops, expert_TK: Array, num_experts: int, x_TD: Array) -> Routing:
    """A routing without scores: gates 1 / K, logits 0, and the choices themselves as probabilities."""
    kind = ops.dtype(ops.accurate(x_TD))
    tokens, choices = expert_TK.shape
    share = ops.constant(1.0 / choices, kind)
    return assign(
        ops,
        expert_TK,
        weight_TK=ops.zeros((tokens, choices), kind) + share,
        logits_TE=ops.zeros((tokens, num_experts), kind),
        probs_TE=ops.sum(ops.one_hot(expert_TK, num_experts, kind), axis=1) * share,
        all_routed=True,
    )
