"""Which all-to-all algorithm is fastest here: tried on this job's ranks, links and sizes before the training starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.comm.mesh import Mesh
from moeport.core.parameters import generator
from moeport.core.routing import Routing

ROUNDS = 3
"""Timed exchanges of each algorithm, in turn, after one that is not."""


@dataclass(frozen=True)
class Choice:
    """The fastest algorithm and the times of all."""

    algorithm: str
    seconds: dict[str, float]
    """Median over rounds of the slowest rank's time there and back."""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in self.seconds.items())
        return f"{self.algorithm} is fastest here: {times}"


def fastest(mesh: Mesh, num_tokens: int, width: int, num_experts: int, top_k: int, dtype: str) -> Choice:
    """Time the exchange of one layer's forward pass by every algorithm. Every rank of the mesh calls it.

    Args:
        mesh: experts over two ranks or more.
        num_tokens: of one rank.
        width: of a token.
        num_experts: of a copy.
        top_k: experts a token, drawn uniformly; rounded up where the router's number varies.
        dtype: type of the tokens.
    """
    ops, world = mesh.world.ops, mesh.world
    random = generator(0, "fastest", world.rank)
    expert_TK = np.argsort(random.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    gate_N = np.full(num_tokens * top_k, 1.0 / top_k, np.float32)
    scores_TE = ops.zeros((num_tokens, num_experts), "float32")
    routing = Routing(
        expert_N=ops.from_numpy(expert_TK.reshape(-1)),
        weight_N=ops.from_numpy(gate_N),
        num_tokens=num_tokens,
        num_experts=num_experts,
        logits_TE=scores_TE,
        probs_TE=scores_TE,
        balanced_choices=top_k,
    )
    x_TD = ops.cast(ops.from_numpy(random.random((num_tokens, width), np.float32)), dtype)
    exchanges = {name: kind(mesh.experts, num_experts) for name, kind in EXCHANGES.items()}
    seconds = np.zeros((1 + ROUNDS, len(exchanges)))
    for number in range(1 + ROUNDS):
        for place, exchange in enumerate(exchanges.values()):
            world.barrier()
            started = time.perf_counter()
            ops.to_numpy(exchange(ops, x_TD, routing, lambda rows, counts: rows))
            seconds[number, place] = time.perf_counter() - started
    slowest = ops.to_numpy(world.all_reduce(ops.from_numpy(seconds[1:].astype(np.float32)), "max"))
    medians = dict(zip(exchanges, np.median(slowest, axis=0).tolist(), strict=True))
    return Choice(min(medians, key=medians.__getitem__), medians)
