"""What every communicator must do, as functions of (communicator, backend, dtype) that fail by an exception.

They run in the processes of a job (collectives.py) and, on a communicator of one rank, in the tests' own process.
"""

import numpy as np

from moeport.comm.check import COLLECTIVES, check_collectives
from moeport.comm.traffic import Volume
from tests.comm import exchange_cases

DTYPES = ("bfloat16", "float32", "float64", "index")
BACKENDS = ("numpy", "torch", "mindspore")
DIFFERENTIATING = ("torch", "mindspore")
CASES = {}
"""Name to (function, types, backends, whether it is a sweep)."""


def case(*dtypes, backends=BACKENDS, sweep=False):
    def register(function):
        CASES[function.__name__] = (function, dtypes or ("float32",), backends, sweep)
        return function

    return register


def names(backend, sweep=False):
    """Of the cases of a backend, with their types: of those for `make test`, or of the sweeps."""
    return [
        f"{name}-{dtype}"
        for name, (_, dtypes, backends, is_sweep) in CASES.items()
        for dtype in dtypes
        if is_sweep == sweep and backend in backends and (dtype != "bfloat16" or backend == "torch")
    ]


def run(name, communicator, backend):
    function, dtype = name.split("-")
    CASES[function][0](communicator, backend, dtype)


class Arrays:
    """Random numbers by rank, exact in every type, on the host and on the device."""

    def __init__(self, communicator, backend, dtype):
        self.communicator, self.ops, self.dtype = communicator, backend.ops, dtype

    def host(self, rank, *shape, seed=0):
        values = np.random.default_rng((seed, rank)).integers(-31, 32, shape)
        return values if self.dtype == "index" else values / 8

    def device(self, values):
        if self.dtype == "index":
            return self.ops.from_numpy(np.asarray(values))
        kept = np.asarray(values, "float32" if self.dtype == "bfloat16" else self.dtype)
        return self.ops.cast(self.ops.from_numpy(kept), self.dtype)

    def mine(self, *shape, seed=0):
        return self.device(self.host(self.communicator.ranks[self.communicator.rank], *shape, seed=seed))

    def every(self, *shape, seed=0):
        return [self.host(rank, *shape, seed=seed) for rank in self.communicator.ranks]

    def equal(self, got, want):
        assert self.ops.dtype(got) == self.ops.dtype(self.device(0))
        np.testing.assert_array_equal(self.ops.to_numpy(got), want)


def groups(communicator):
    """The communicator, and groups of it: every second rank; the first and the rest; each by itself."""
    yield communicator
    if communicator.size >= 4:
        yield communicator.group([communicator.ranks[::2], communicator.ranks[1::2]])
        yield communicator.group([communicator.ranks[:1], communicator.ranks[1:]])
    elif communicator.size > 1:
        yield communicator.group([[rank] for rank in communicator.ranks])


@case(*DTYPES)
def all_reduce(communicator, backend, dtype):
    for group in groups(communicator):
        arrays = Arrays(group, backend, dtype)
        for shape in ((5, 3), (7,), (), (0, 2)):
            x = arrays.mine(*shape)
            for op, combine in (("sum", np.sum), ("max", np.max)):
                arrays.equal(group.all_reduce(x, op), combine(arrays.every(*shape), axis=0))
            arrays.equal(x, arrays.every(*shape)[group.rank])


@case(*DTYPES)
def all_gather(communicator, backend, dtype):
    for group in groups(communicator):
        arrays = Arrays(group, backend, dtype)
        for shape in ((5, 3), (2, 1, 3), (), (0, 2)):
            arrays.equal(group.all_gather(arrays.mine(*shape)), np.stack(arrays.every(*shape)))


@case(*DTYPES)
def broadcast(communicator, backend, dtype):
    for group in groups(communicator):
        arrays = Arrays(group, backend, dtype)
        for source in range(group.size):
            for shape in ((5, 3), (), (0, 2)):
                x = arrays.mine(*shape)
                arrays.equal(group.broadcast(x, source), arrays.every(*shape)[source])
                arrays.equal(x, arrays.every(*shape)[group.rank])


@case(*DTYPES)
def reduce_scatter(communicator, backend, dtype):
    for group in groups(communicator):
        arrays = Arrays(group, backend, dtype)
        for n in (1, 3):
            total = np.sum(arrays.every(n * group.size, 2), axis=0)
            arrays.equal(group.reduce_scatter(arrays.mine(n * group.size, 2)), total[n * group.rank :][:n])


def splits(size):
    """Matrices of the rows that each rank sends to each: zeros in places, alone and everywhere."""
    yield np.zeros((size, size), int)
    yield np.eye(size, dtype=int) * 2
    for seed in range(4):
        yield np.random.default_rng(seed).integers(0, 4, (size, size)) * (np.indices((size, size)).sum(0) % 3 != seed)
    for rank in (0, size - 1):
        yield np.where(np.arange(size) == rank, 3, 0) + np.zeros((size, 1), int)


def exchanged(rows, blocks):
    """What each rank receives when rank i holds `blocks[i]` and sends `rows[i, j]` of its rows to rank j."""
    ends = np.cumsum(rows, axis=1)
    parts = [[blocks[i][ends[i, j] - rows[i, j] : ends[i, j]] for j in range(len(rows))] for i in range(len(rows))]
    return [np.concatenate([parts[i][j] for i in range(len(rows))]) for j in range(len(rows))]


@case(*DTYPES)
def all_to_all(communicator, backend, dtype):
    for group in groups(communicator):
        arrays = Arrays(group, backend, dtype)
        for rows in splits(group.size):
            for trailing in ((3,), (2, 2), ()):
                blocks = [arrays.host(rank, n, *trailing) for rank, n in zip(group.ranks, rows.sum(1), strict=True)]
                x = arrays.device(blocks[group.rank])
                got = group.all_to_all(x, rows[group.rank].tolist(), rows[:, group.rank].tolist())
                arrays.equal(got, exchanged(rows, blocks)[group.rank])


@case("bfloat16", "float32", "float64", backends=DIFFERENTIATING)
def all_to_all_backward(communicator, backend, dtype):
    """There, squared, and back again: the gradient of sum(w * back(there(x)^2)) is 2 w x, and w counts alone."""
    for group in groups(communicator):
        arrays = Arrays(group, backend, dtype)
        for rows in splits(group.size):
            send, receive = rows[group.rank].tolist(), rows[:, group.rank].tolist()
            x, w = (arrays.host(group.ranks[group.rank], sum(send), 3, seed=seed) for seed in (1, 2))
            w = np.sign(w)
            weight = arrays.device(w)

            def loss(params, group=group, send=send, receive=receive, weight=weight):
                there = group.all_to_all(params["x"], send, receive)
                return backend.ops.sum(group.all_to_all(there * there, receive, send) * weight)

            value, gradients = backend.value_and_grad(loss)({"x": arrays.device(x)})
            arrays.equal(gradients["x"], 2 * w * x)
            if dtype == "float64" and x.size:  # MindSpore's sum of nothing is not 0
                np.testing.assert_allclose(backend.ops.to_numpy(value), (w * x * x).sum())


@case(backends=DIFFERENTIATING)
def all_to_all_gradient_is_what_receivers_hold(communicator, backend, dtype):
    """One way alone: what the gradient is at the receivers, sent back."""
    arrays = Arrays(communicator, backend, dtype)
    for rows in splits(communicator.size):
        send, receive = rows[communicator.rank].tolist(), rows[:, communicator.rank].tolist()
        weights = [arrays.host(rank, n, 2, seed=3) for rank, n in enumerate(rows.sum(0))]
        weight = arrays.device(weights[communicator.rank])

        def loss(params, send=send, receive=receive, weight=weight):
            return backend.ops.sum(communicator.all_to_all(params["x"], send, receive) * weight)

        _, gradients = backend.value_and_grad(loss)({"x": arrays.mine(sum(send), 2)})
        arrays.equal(gradients["x"], exchanged(rows.T, weights)[communicator.rank])


@case(backends=DIFFERENTIATING)
def collectives_inside_a_differentiated_function(communicator, backend, dtype):
    """Counts are exchanged while the forward pass runs; the results of other collectives are constants."""
    arrays, size = Arrays(communicator, backend, dtype), communicator.size
    send = [1 + (communicator.rank + peer) % 3 for peer in range(size)]

    def loss(params):
        counts = communicator.all_to_all(backend.ops.from_numpy(np.array(send)), [1] * size, [1] * size)
        receive = backend.ops.to_numpy(counts).tolist()
        assert receive == send
        got = communicator.all_to_all(params["x"], send, receive)
        return backend.ops.sum(got) + backend.ops.sum(params["x"] * communicator.all_reduce(params["x"][:1]))

    x = np.full((sum(send), 2), 2)
    _, gradients = backend.value_and_grad(loss)({"x": arrays.device(x)})
    arrays.equal(gradients["x"], np.full_like(x, 1 + 2 * size))


@case(backends=("torch",))
def rows_without_a_gradient(communicator, backend, dtype):
    """A rank whose rows are constants takes part in the exchange of gradients when `backward` runs."""
    size, arrays = communicator.size, Arrays(communicator, backend, dtype)
    last = communicator.rank == size - 1 > 0
    x = arrays.device(np.ones((size, 2))).requires_grad_(not last)
    communicator.all_to_all(x, [1] * size, [1] * size).sum().backward()
    if not last:
        arrays.equal(x.grad, np.ones((size, 2)))


def on_nodes(communicator, nodes):
    """The communicator, as if its ranks were on this many nodes."""
    group = communicator.group([communicator.ranks])
    group._locate([position * nodes // group.size for position in range(group.size)])
    return group


def layouts(communicator):
    """The ranks on one node, on nodes of one rank each, and last on nodes of two ranks."""
    size = communicator.size
    last = max(1, size // 2)
    return [on_nodes(communicator, nodes) for nodes in (*sorted({1, size} - {last}), last)]


@case("float64", backends=DIFFERENTIATING)
def expert_exchange(communicator, backend, dtype):
    """A sample of layouts and chunks; `expert_exchange_sweep` has them all.

    Messages of MindSpore are slow, and its training on ranks exchanges rows in one part.
    """
    groups = layouts(communicator)
    if backend.name == "torch":
        exchange_cases.check(exchange_cases.sample(groups), backend, 3)
        exchange_cases.check(exchange_cases.every(groups[-1:]), backend, 1, ("spread", "some unrouted"))
    else:
        names = ("other numbers of tokens", "some unrouted", "all unrouted", "all to the last expert")
        exchange_cases.check(exchange_cases.in_parts(groups[-1:]), backend, 2, names)


@case("float64", backends=("torch",), sweep=True)
def expert_exchange_sweep(communicator, backend, dtype):
    for experts_a_rank in (1, 3):
        exchange_cases.check(exchange_cases.every(layouts(communicator)), backend, experts_a_rank)


@case()
def groups_know_their_ranks(communicator, backend, dtype):
    """Positions count inside the group, ranks over the job; groups of a group too."""
    ranks = communicator.ranks
    assert ranks == tuple(range(communicator.size))
    whole = communicator.group([ranks[::-1]])
    assert whole.ranks == ranks
    tail = communicator.group([ranks[:1], ranks[1:]] if communicator.size > 1 else [ranks])
    assert tail.ranks == (ranks[1:] if communicator.rank else ranks[:1])
    assert tail.ranks[tail.rank] == communicator.rank
    last = tail.group([[rank] for rank in tail.ranks])
    assert (last.ranks, last.rank, last.size) == ((communicator.rank,), 0, 1)
    total = tail.all_reduce(backend.ops.from_numpy(np.array([communicator.rank])))
    assert backend.ops.to_numpy(total).tolist() == [sum(tail.ranks)]


@case()
def traffic_counts_bytes(communicator, backend, dtype):
    arrays, size, rank = Arrays(communicator, backend, "float64"), communicator.size, communicator.rank
    group = communicator.group([communicator.ranks])
    group._locate([other // 2 for other in range(size)])
    near = sum(other // 2 == rank // 2 for other in range(size)) - 1
    far = size - 1 - near
    group.all_gather(arrays.mine(3, 5))
    group.all_gather(arrays.mine())
    group.broadcast(arrays.mine(2, 5), 0)
    group.reduce_scatter(arrays.mine(4 * size, 5))
    group.all_reduce(arrays.mine(2 * size + 1, 5))
    rows = np.add.outer(np.arange(size), np.arange(size)) % 3
    others = [other for other in range(size) if other != rank]
    group.all_to_all(arrays.mine(rows[rank].sum(), 5), rows[rank].tolist(), rows[:, rank].tolist())
    group.barrier()
    width, root = 5 * 8, int(rank == 0)
    near_rows = int(sum(rows[rank, other] for other in others if other // 2 == rank // 2))
    far_rows = int(sum(rows[rank, other] for other in others if other // 2 != rank // 2))
    assert group.traffic.snapshot() == {
        "all_gather": Volume(2, 4 * near, 4 * far, near * (3 * width + 8), far * (3 * width + 8)),
        "broadcast": Volume(1, 2 * near * root, 2 * far * root, 2 * near * width * root, 2 * far * width * root),
        "reduce_scatter": Volume(1, 4 * near, 4 * far, 4 * near * width, 4 * far * width),
        "all_reduce": Volume(1, 6 * near, 6 * far, 6 * near * width, 6 * far * width),
        "all_to_all": Volume(1, near_rows, far_rows, near_rows * width, far_rows * width),
    }
    assert communicator.traffic is not group.traffic
    group.traffic.reset()
    assert group.traffic.snapshot() == {}


@case()
def nodes_are_known(communicator, backend, dtype):
    assert communicator.nodes == (0,) * communicator.size


@case()
def probe_passes(communicator, backend, dtype):
    dtypes = [dtype for dtype in DTYPES if dtype != "bfloat16" or backend.name == "torch"]
    grad = backend.value_and_grad if backend.name != "numpy" else None
    results = check_collectives(communicator, dtypes, grad)
    pairs = [(result.dtype, result.collective) for result in results]
    left_out = {(dtype, "all_to_all gradient") for dtype in (dtypes if grad is None else ["index"])}
    assert pairs == [(d, c) for d in dtypes for c in COLLECTIVES if (d, c) not in left_out]
    assert all(result.arrays for result in results if result.collective != "barrier")
    silent = (
        COLLECTIVES if communicator.size == 1 else ("barrier",) if communicator.rank == 0 else ("barrier", "broadcast")
    )
    assert all(result.sent_bytes > 0 for result in results if result.collective not in silent)
