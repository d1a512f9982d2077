"""What `moeport bench comm` measures: collectives, and the all-to-all of experts by each algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeport.backends.base import Backend
from moeport.bench.options import Tokens
from moeport.comm.communicator import Communicator
from moeport.comm.exchange import ExpertExchange
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing
from moeport.plan.traffic import expert_choices

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "sendrecv", "all_to_all")


@dataclass(frozen=True)
class Measured:
    """One operation at one size, ready to run."""

    type: str
    redop: str
    root: int
    bytes: int
    """The size that algorithm bandwidth refers to, as in nccl-tests."""
    count: int
    """Number of elements."""
    bus_factor: float
    """Bus bandwidth over algorithm bandwidth, as in nccl-tests."""
    run: Callable[[], Array]
    wrong: Callable[[Array], int]
    """Counts the wrong elements of a result."""


def collective(name: str, communicator: Communicator, ops: Ops, dtype: str, item_bytes: int, size: int) -> Measured:
    """A collective of `size` bytes, as nccl-tests counts them: the whole array on a rank that has all of it.

    Values are small integers, exact in every type, so that results can be compared for equality.

    Args:
        name: a name in COLLECTIVES. `sendrecv` is a ring: each rank sends to the next.
        communicator: the ranks.
        ops: the backend's operations.
        dtype: type of the elements.
        item_bytes: size of one element.
        size: bytes; rounded down to whole elements per rank, at least one.
    """
    n, rank = communicator.size, communicator.rank
    part = max(1, size // item_bytes // n)
    count = part * n if name in ("all_gather", "reduce_scatter", "all_to_all") else max(1, size // item_bytes)

    def values(source: int, length: int) -> np.ndarray:
        return (np.arange(length) * 7 + source * 3) % 13

    def array(host: np.ndarray) -> Array:
        return ops.cast(ops.from_numpy(host.astype(np.float32)), dtype)

    total = [values(source, count) for source in range(n)] if name in ("all_reduce", "reduce_scatter") else []
    mine = slice(rank * part, (rank + 1) * part)
    run: Callable[[], Array]
    if name == "all_reduce":
        x, want = array(values(rank, count)), np.sum(total, axis=0)
        run, factor = lambda: communicator.all_reduce(x), 2 * (n - 1) / n
    elif name == "all_gather":
        x, want = array(values(rank, part)), np.stack([values(source, part) for source in range(n)])
        run, factor = lambda: communicator.all_gather(x), (n - 1) / n
    elif name == "reduce_scatter":
        x, want = array(values(rank, count)), np.sum(total, axis=0)[mine]
        run, factor = lambda: communicator.reduce_scatter(x), (n - 1) / n
    elif name == "broadcast":
        x, want = array(values(rank, count)), values(0, count)
        run, factor = lambda: communicator.broadcast(x, 0), 1.0
    elif name == "sendrecv":
        x, want = array(values(rank, count)), values((rank - 1) % n, count)
        send = [count if peer == (rank + 1) % n else 0 for peer in range(n)]
        receive = [count if peer == (rank - 1) % n else 0 for peer in range(n)]
        run, factor = lambda: communicator.all_to_all(x, send, receive), 1.0
    else:
        x, want = array(values(rank, count)), np.concatenate([values(source, count)[mine] for source in range(n)])
        run, factor = lambda: communicator.all_to_all(x, [part] * n, [part] * n), (n - 1) / n
    return Measured(
        type=dtype,
        redop="sum" if name in ("all_reduce", "reduce_scatter") else "none",
        root=0 if name == "broadcast" else -1,
        bytes=count * item_bytes,
        count=count,
        bus_factor=factor,
        run=run,
        wrong=lambda got: int((ops.to_numpy(got) != want).sum()),
    )


def expert_exchange(
    exchange: ExpertExchange, backend: Backend, dtype: str, item_bytes: int, size: int, tokens: Tokens
) -> Measured:
    """Send `size` bytes of tokens per rank to their experts and back; the experts double what they get.

    Gates are powers of two, so that a token's result is exact in float32 in any order of summation.

    Args:
        exchange: the algorithm, with its ranks and number of experts.
        backend: for operations and gradients.
        dtype: type of the tokens.
        item_bytes: size of one element.
        size: bytes of tokens per rank; rounded down to whole tokens, at least one.
        tokens: their width, and how they choose experts.
    """
    ops = backend.ops
    count = max(1, size // item_bytes // tokens.width)
    host_TD = (np.arange(count * tokens.width).reshape(count, -1) * 5 + exchange.communicator.rank) % 11
    gate_TK = 2.0 ** -(1 + np.arange(count * tokens.top_k).reshape(count, -1) % 3)
    x_TD = ops.cast(ops.from_numpy(host_TD.astype(np.float32)), dtype)
    routing = _routing(exchange, ops, gate_TK, tokens)
    two = ops.constant(2.0, dtype)

    def forward(tokens_TD: Array) -> Array:
        return exchange(ops, tokens_TD, routing, lambda x_RD, counts: x_RD * two)

    want_TD = 2.0 * gate_TK.sum(1, keepdims=True) * (np.ones_like(host_TD) if tokens.backward else host_TD)
    differentiated = backend.value_and_grad(lambda params: ops.sum(forward(params["x"]))) if tokens.backward else None

    def run() -> Array:
        return differentiated({"x": x_TD})[1]["x"] if differentiated else forward(x_TD)

    return Measured(
        type=dtype,
        redop="none",
        root=-1,
        bytes=count * tokens.width * item_bytes,
        count=count * tokens.width,
        bus_factor=1.0,
        run=run,
        wrong=lambda got: int((np.abs(ops.to_numpy(got) - want_TD) > _tolerance(dtype) * np.abs(want_TD)).sum()),
    )


def _routing(exchange: ExpertExchange, ops: Ops, gate_TK: np.ndarray, tokens: Tokens) -> Routing:
    """The routing of this rank's tokens, with these gates."""
    communicator, experts = exchange.communicator, exchange.num_experts
    rank, nodes = communicator.rank, sorted(set(communicator.nodes))
    expert_TK = expert_choices(
        tokens.traffic,
        len(gate_TK),
        experts,
        tokens.top_k,
        rank=communicator.ranks[rank],
        size=communicator.size,
        node=nodes.index(communicator.nodes[rank]),
        nodes=len(nodes),
    )
    scores_TE = ops.zeros((len(gate_TK), experts), "float32")
    return Routing(
        expert_N=ops.from_numpy(expert_TK.reshape(-1)),
        weight_N=ops.from_numpy(gate_TK.reshape(-1).astype(np.float32)),
        num_tokens=len(gate_TK),
        num_experts=experts,
        logits_TE=scores_TE,
        probs_TE=scores_TE,
        balanced_choices=tokens.top_k,
    )


def _tolerance(dtype: str) -> float:
    return 0.02 if dtype == "bfloat16" else 0.0
