"""Sparsity-constrained expert choice (Liu et al. 2024, arXiv 2401.15969; the transport of arXiv 2209.15466)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.routers.expert_choice import ExpertsChooseConfig, ExpertsChooseRouter

_LEARNING_RATE, _DECAY, _DECAY_OF_SQUARES = 1e-2, 0.9, 0.999
_FORMER_EPSILON = 1e-2
"""That of versions without `adam_epsilon`."""


class SparsityConstrainedExpertChoiceConfig(ExpertsChooseConfig):
    """Each expert takes its tokens from a transport plan with at most C nonzero entries per expert; softmax gates."""

    name: Literal["sparsity_constrained_expert_choice"] = "sparsity_constrained_expert_choice"
    """`sparsity_constrained_expert_choice`"""
    new_defaults: ClassVar[tuple[str, ...]] = ("adam_epsilon",)
    solver_iterations: PositiveInt = 20
    """Steps of Adam on the dual of the transport problem."""
    adam_epsilon: PositiveFloat = 1e-8
    """Epsilon of Adam; the default is that of the authors' released code. Configs written by versions without this key,
    which give all other options, count as 0.01."""

    @model_validator(mode="after")
    def _epsilon_of_earlier_versions(self) -> Self:
        written = self.gives("mean_experts", "group", "solver_iterations")
        if written and not self.gives("adam_epsilon"):
            object.__setattr__(self, "adam_epsilon", _FORMER_EPSILON)
        return self


class SparsityConstrainedExpertChoiceRouter(ExpertsChooseRouter[SparsityConstrainedExpertChoiceConfig]):
    """Expert e takes the tokens where column e of the plan is not 0; gates p_e, p = softmax(W x).

    The plan maximises sum(plan * p) - |plan|^2 / 2 over plans with rows that sum to 1, columns that sum to S / E and at
    most C nonzero entries a column. It is found by Adam with learning rate 0.01 on the semi-dual, without gradient.
    Where a column has fewer than C nonzero entries, the expert goes on to the tokens of next highest p_e plus
    potential; the authors' released code goes on by index.
    """

    paper = "Routers in Vision Mixture of Experts, arXiv 2401.15969; Sparsity-Constrained Transport, arXiv 2209.15466"

    def scores(self, ops: Ops, logits_GSE: Array, probs_GSE: Array) -> Array:
        """p_e plus the potential of the token, whose C largest entries are those of the column of the plan."""
        similarity_GES = ops.stop_gradient(ops.transpose(probs_GSE, (0, 2, 1)))
        capacity = self.config.capacity(probs_GSE.shape[1], self.num_experts)
        steps, epsilon = self.config.solver_iterations, self.config.adam_epsilon
        # Not recorded for parity: Adam divides small gradients by their own size, which shows only their rounding,
        # while the potentials move by no more than the learning rate.
        return similarity_GES + potentials(ops.unrecorded(), similarity_GES, capacity, steps, epsilon)


def potentials(ops: Ops, similarity_GES: Array, nonzeros: int, iterations: int, epsilon: float) -> Array:
    """Potentials alpha (G, 1, S) of the tokens after this many steps of Adam from 0 on the semi-dual.

    Which is sum(alpha) - sum_e max over t of (similarity_e + alpha) . t - |t|^2 / 2, with t at least 0, of sum S / E
    and of at most C nonzero entries (arXiv 2209.15466). Its gradient is 1 - the sums of the rows of the plan. Adam's
    epsilon is squared and under the root, which makes a difference only to gradients as small as it; ours.

    Args:
        ops: the backend's operations.
        similarity_GES: what the plan gathers.
        nonzeros: C.
        iterations: steps.
        epsilon: of Adam.
    """
    groups, experts, size = similarity_GES.shape

    def number(value: float) -> Array:
        return ops.constant_like(value, similarity_GES)

    first_GEC = ops.reshape(ops.arange(groups) * ops.index(size), (groups, 1, 1))
    alpha_G1S = mean_G1S = square_G1S = ops.zeros((groups, 1, size), ops.dtype(similarity_GES))
    for step in range(1, iterations + 1):
        token_GEC, plan_GEC = sparse_columns(ops, similarity_GES + alpha_G1S, nonzeros, size / experts)
        token_N, plan_N = (ops.reshape(x, (-1,)) for x in (token_GEC + first_GEC, plan_GEC))
        rows_G1S = ops.reshape(ops.segment_sum(plan_N, token_N, groups * size), (groups, 1, size))
        gradient = number(1.0) - rows_G1S
        mean_G1S = mean_G1S * number(_DECAY) + gradient * number(1 - _DECAY)
        square_G1S = square_G1S * number(_DECAY_OF_SQUARES) + gradient * gradient * number(1 - _DECAY_OF_SQUARES)
        mean = mean_G1S * number(1 / (1 - _DECAY**step))
        square = square_G1S * number(1 / (1 - _DECAY_OF_SQUARES**step))
        alpha_G1S = alpha_G1S + mean * ops.rsqrt(square + number(epsilon**2)) * number(_LEARNING_RATE)
    return alpha_G1S


def sparse_columns(ops: Ops, x_GES: Array, nonzeros: int, mass: float) -> tuple[Array, Array]:
    """For each row x the t that maximises x . t - |t|^2 / 2, at least 0, of sum `mass`, with at most C nonzero entries.

    That is `mass` times the projection of x / mass onto the simplex, from the C largest entries alone (Kyrillidis et
    al. 2013, arXiv 1206.1529).

    Returns: (ids of the C largest entries, t there), both (G, E, C).
    """
    kind = ops.dtype(x_GES)
    ids_GEC = ops.topk_ids(x_GES, nonzeros)
    best_GEC = ops.take_last(x_GES, ids_GEC)
    v_GEC = (best_GEC - best_GEC[..., :1]) * ops.constant(1 / mass, kind)
    one, zero = ops.constant_like(1.0, v_GEC), ops.constant_like(0.0, v_GEC)
    # A prefix of the sorted entries is positive: those above (sum of the entries up to them - 1) / number of them.
    place_C = ops.arange(nonzeros)
    up_to_CC = ops.cast(ops.reshape(place_C, (-1, 1)) <= ops.reshape(place_C, (1, -1)), kind)
    number_C = ops.cast(place_C, kind) + one
    positive_GEC = v_GEC * number_C > ops.matmul(v_GEC, up_to_CC) - one
    total_GE1 = ops.sum(ops.where(positive_GEC, v_GEC, zero), axis=-1, keepdims=True) - one
    count_GE1 = ops.sum(ops.cast(positive_GEC, kind), axis=-1, keepdims=True)
    t_GEC = ops.where(positive_GEC, v_GEC - total_GE1 / count_GE1, zero)
    return ids_GEC, t_GEC * ops.constant(mass, kind)
