"""What `moeport bench comm` measures: collectives, and the all-to-all of experts by each algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from moeport.backends.base import Backend
from moeport.bench.options import Tokens
from moeport.comm.communicator import Communicator
from moeport.comm.exchange import ExpertExchange
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing
from moeport.plan.traffic import expert_choices

EXACT = {"bfloat16": 2**8, "float32": 2**24, "float64": 2**53}
"""Up to this number, every integer is exact in the type."""
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
    """Number of elements, as nccl-tests counts them."""
    bus_factor: float
    """Bus bandwidth over algorithm bandwidth, as in nccl-tests."""
    run: Callable[[], Array]
    wrong: Callable[[Array], int]
    """Counts the wrong elements of a result."""


@dataclass(frozen=True)
class Elements:
    """The elements of a collective."""

    dtype: str
    item_bytes: int
    """Size of one."""
    size: int
    """Bytes asked for; rounded down to whole elements per rank, at least one."""


def collective(
    name: str, communicator: Communicator, ops: Ops, elements: Elements, redop: str = "sum", root: int = 0
) -> Measured:
    """A collective of `size` bytes, as nccl-tests counts them: the whole array on a rank that has all of it. Elements
    are counted as there too: those that one rank contributes to each part of all_gather, reduce_scatter and all_to_all.

    Values are small integers, exact in every type, and sums are exact up to 256 ranks, so that results can be compared
    for equality; beyond that, a sum may be off by what its type can hold.

    Args:
        name: a name in COLLECTIVES. `sendrecv` is a ring: each rank sends to the next.
        communicator: the ranks.
        ops: the backend's operations.
        elements: type and number.
        redop: reduction of all_reduce, sum or max.
        root: rank that broadcasts.
    """
    n, rank = communicator.size, communicator.rank
    divided, reduces = name in ("all_gather", "reduce_scatter", "all_to_all"), name in ("all_reduce", "reduce_scatter")
    part = max(1, elements.size // elements.item_bytes // n)
    length = part * n if divided else max(1, elements.size // elements.item_bytes)
    of_rank = partial(_values, n)
    mine = slice(rank * part, (rank + 1) * part)
    own, factor = of_rank(rank, part if name == "all_gather" else length), (n - 1) / n
    x = ops.cast(ops.from_numpy(own.astype(np.float32)), elements.dtype)
    run: Callable[[], Array]
    if name == "all_reduce":
        total = (np.sum if redop == "sum" else np.max)([of_rank(source, length) for source in range(n)], axis=0)
        run, want, factor = lambda: communicator.all_reduce(x, redop), total, 2 * (n - 1) / n
    elif name == "all_gather":
        run, want = lambda: communicator.all_gather(x), np.stack([of_rank(source, part) for source in range(n)])
    elif name == "reduce_scatter":
        total = np.sum([of_rank(source, length) for source in range(n)], axis=0)
        run, want = lambda: communicator.reduce_scatter(x), total[mine]
    elif name == "broadcast":
        run, want, factor = lambda: communicator.broadcast(x, root), of_rank(root, length), 1.0
    elif name == "sendrecv":
        send = [length if peer == (rank + 1) % n else 0 for peer in range(n)]
        receive = [length if peer == (rank - 1) % n else 0 for peer in range(n)]
        run, want = lambda: communicator.all_to_all(x, send, receive), of_rank((rank - 1) % n, length)
        factor = 1.0
    else:
        want = np.concatenate([of_rank(source, length)[mine] for source in range(n)])
        run = lambda: communicator.all_to_all(x, [part] * n, [part] * n)  # noqa: E731
    allowed = sum_error(want, n, elements.dtype) if reduces and redop == "sum" else 0.0
    return Measured(
        type=elements.dtype,
        redop=redop if reduces else "none",
        root=root if name == "broadcast" else -1,
        bytes=length * elements.item_bytes,
        count=part if divided else length,
        bus_factor=factor,
        run=run,
        wrong=lambda got: int((~(np.abs(ops.to_numpy(got) - want) <= allowed)).sum()),
    )


def _values(ranks: int, source: int, length: int) -> np.ndarray:
    """The elements of a rank: integers so small that every partial sum over up to 256 ranks is exact in bfloat16."""
    largest = max(1, min(12, EXACT["bfloat16"] // ranks))
    return (np.arange(length) * 7 + source * 3) % (largest + 1)


def sum_error(total: np.ndarray, ranks: int, dtype: str) -> np.ndarray:
    """How far a sum of non-negative integers over ranks may be off: 0 where every partial sum is exact in the type,
    otherwise half a unit in the last place for each of the additions.
    """
    exact = EXACT[dtype]
    return np.where(total <= exact, 0.0, (ranks - 1) * total / (2.0 * exact))


def expert_exchange(exchange: ExpertExchange, backend: Backend, elements: Elements, tokens: Tokens) -> Measured:
    """Send `size` bytes of tokens per rank to their experts and back; the experts double what they get.

    Gates are powers of two, so that a token's result is exact in float32 in any order of summation.

    Args:
        exchange: the algorithm, with its ranks and number of experts.
        backend: for operations and gradients.
        elements: those of the tokens of a rank; rounded down to whole tokens, at least one.
        tokens: their width, and how they choose experts.
    """
    ops, dtype, item_bytes = backend.ops, elements.dtype, elements.item_bytes
    count = max(1, elements.size // item_bytes // tokens.width)
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
