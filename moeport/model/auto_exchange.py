"""Finds the fastest all-to-all by timing the candidates on this job's ranks, links and sizes, before training starts.

Timing is more accurate than predicting: all that `moeport.plan.planner` knows about links comes from such timings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.comm.mesh import Mesh
from moeport.config.schema import Config
from moeport.core.array import Array
from moeport.core.parameters import generator
from moeport.core.routing import Routing
from moeport.model.moe import mlp_specs

ROUNDS = 5
"""Timed passes per candidate, in turn, after an untimed one."""
CHUNKS = (1, 2, 4)
"""Numbers of chunks that `comm.chunks: auto` tries."""

Candidate = tuple[str, int]
"""Algorithm and number of chunks."""


@dataclass(frozen=True)
class FastestExchange:
    """The fastest all-to-all, and the times of all candidates."""

    algorithm: str
    chunks: int
    seconds: dict[Candidate, float]
    """Median over rounds of the slowest rank's time for one layer's exchange and experts, forward and backward."""

    def __str__(self) -> str:
        times = ", ".join(f"{label(*candidate)} {seconds * 1e3:.3g} ms" for candidate, seconds in self.seconds.items())
        return f"{label(self.algorithm, self.chunks)} is fastest: {times}"


def fastest(
    mesh: Mesh, config: Config, num_tokens: int, top_k: int, dtype: str, value_and_grad: Callable[..., Any]
) -> FastestExchange:
    """Time the exchange and experts of one layer, forward and backward: with every algorithm if `comm.algorithm` is
    auto, then with the fastest one and other numbers of chunks if `comm.chunks` is auto. Every rank of the mesh calls
    it.

    Args:
        mesh: spreads the experts over at least two ranks.
        config: shapes of the layer, and what to try.
        num_tokens: tokens per rank.
        top_k: experts per token, drawn uniformly; rounded up if the router's number varies.
        dtype: type of tokens and experts.
        value_and_grad: the backend's `value_and_grad`.
    """
    comm = config.comm
    names = list(EXCHANGES) if comm.algorithm == "auto" else [comm.algorithm]
    chunks = list(CHUNKS) if comm.chunks == "auto" else [comm.chunks]
    trial = _Trial(mesh, config, num_tokens, top_k, dtype, value_and_grad, names)
    seconds = trial.times([(name, chunks[0]) for name in names])
    best = min(seconds, key=seconds.__getitem__)
    if len(chunks) > 1:
        again = trial.times([(best[0], number) for number in chunks])
        best = min(again, key=again.__getitem__)
        seconds |= again
    return FastestExchange(*best, seconds)


class _Trial:
    """One layer's exchange and experts on random tokens."""

    def __init__(
        self,
        mesh: Mesh,
        config: Config,
        num_tokens: int,
        top_k: int,
        dtype: str,
        value_and_grad: Callable[..., Any],
        names: Sequence[str],
    ):
        ops, world, moe = mesh.world.ops, mesh.world, config.model.moe
        random = generator(0, "fastest", world.rank)

        def draw(*shape: int) -> Array:
            return ops.cast(ops.from_numpy(random.random(shape, np.float32)), dtype)

        expert_TK = np.argsort(random.random((num_tokens, moe.num_experts)), axis=1)[:, :top_k]
        scores_TE = ops.zeros((num_tokens, moe.num_experts), "float32")
        self.routing = Routing(
            expert_N=ops.from_numpy(expert_TK.reshape(-1)),
            weight_N=ops.from_numpy(np.full(num_tokens * top_k, 1.0 / top_k, np.float32)),
            num_tokens=num_tokens,
            num_experts=moe.num_experts,
            logits_TE=scores_TE,
            probs_TE=scores_TE,
            balanced_choices=top_k,
        )
        local = moe.num_experts // mesh.experts.size
        specs = mlp_specs(config.model.d_model, moe.expert_hidden, moe.activation, 1.0, 1.0)
        self.params = {spec.name: draw(local, *spec.shape) for spec in specs}
        self.params["x"] = draw(num_tokens, config.model.d_model)
        self.mesh, self.activation, self.value_and_grad = mesh, moe.activation, value_and_grad
        self.exchanges = {name: EXCHANGES[name](mesh.experts, moe.num_experts) for name in names}

    def times(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Seconds per candidate."""
        ops, world = self.mesh.world.ops, self.mesh.world
        seconds = np.zeros((1 + ROUNDS, len(candidates)))
        for number in range(1 + ROUNDS):
            for column, candidate in enumerate(candidates):
                world.barrier()
                started = time.perf_counter()
                self._run(*candidate)
                seconds[number, column] = time.perf_counter() - started
        slowest = ops.to_numpy(world.all_reduce(ops.from_numpy(seconds[1:].astype(np.float32)), "max"))
        return dict(zip(candidates, np.median(slowest, axis=0).tolist(), strict=True))

    def _run(self, name: str, chunks: int) -> None:
        ops, exchange = self.mesh.world.ops, self.exchanges[name]
        exchange.chunks = chunks

        def total(params: dict[str, Array]) -> Array:
            def experts(x_RD: Array, counts_E: Array) -> Array:
                return ops.grouped_mlp(x_RD, params["w_in"], params["w_out"], counts_E, self.activation)

            return ops.sum(exchange(ops, params["x"], self.routing, experts))

        _, gradients = self.value_and_grad(total)(self.params)
        ops.to_numpy(gradients["x"][:1])


def label(algorithm: str, chunks: int) -> str:
    """Name of an all-to-all in messages."""
    return algorithm if chunks == 1 else f"{algorithm} in {chunks} chunks"
