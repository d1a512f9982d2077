"""Parameters by name, and random numbers that are the same on every backend.

A model is a flat dict of dotted names to arrays. Initial values and routing noise come from numpy's counter-based
Philox generator, keyed by their purpose, so that every backend sees the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Literal, TypeVar

import numpy as np
from typing_extensions import override

from moeport.core.weights import Box, Weights

INITIAL_VALUES_VERSION = 2
"""Each version draws other values. In version 1, every parameter was one block."""
BLOCK_ENTRIES = 2**20
"""Most entries of a parameter that one generator draws, unless a single row has more."""
PHILOX_FLOATS = 8
"""Numbers of float32 that Philox makes of one value of its counter."""
WORTH_A_THREAD = 2**18
"""Entries for which it pays to start a thread."""

Value = TypeVar("Value")

TokenTable = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Builds a table with one row per vocabulary id, from the counts (V,) of each id in the training set."""


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and initial value of one parameter."""

    name: str
    shape: tuple[int, ...]
    init: Literal["normal", "ones", "zeros"] | TokenTable = "normal"
    """How the initial value is drawn; a table indexed by token id never changes afterwards."""
    std: float = 0.02
    """Standard deviation of a normal init."""
    trainable: bool = True
    """False for state that the router updates itself without gradients, for tables indexed by token id, and for what is
    fixed."""
    fixed: bool = False
    """Whether it keeps its initial value, as a table does: no router updates it, so no step has to look at it."""
    matrices: int = 0
    """How many matrices between hidden states its rows hold, one above the other: 2 for gate and up projection of
    SwiGLU. 0: none, as in embeddings, heads, routers and vectors."""
    in_compute_type: bool = False
    """Whether its every use casts it to the compute type and gives it a gradient of that type, so that a backend may
    cast it once per update. False for what computes in float32, as routers and norms do, and for embeddings and heads,
    whose gradients are sums over many rows in float32.
    """

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def is_table(self) -> bool:
        """Whether it is a constant table indexed by token id."""
        return callable(self.init)

    @property
    def is_state(self) -> bool:
        """Whether a router or a capacity policy updates it, without gradients."""
        return not (self.trainable or self.fixed or self.is_table)

    @property
    def is_expert(self) -> bool:
        """Whether its first dimension runs over the routed experts, which may be divided among ranks."""
        return is_expert(self.name)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, but not to norms and vectors."""
        return self.trainable and len(self.shape) >= 2


def is_expert(name: str) -> bool:
    """Whether the first dimension of a parameter, or of its moments, runs over the routed experts."""
    return "experts" in name.split(".")[:-1]


def parameter_dtype(dtype: str) -> str:
    """Type of parameters and optimiser state for a compute type: float64 for float64, otherwise float32."""
    return "float64" if dtype == "float64" else "float32"


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A Philox generator keyed by `seed` and `purpose`; equal keys give equal numbers on every machine."""
    return np.random.Generator(_philox(seed, *purpose))


def _philox(seed: int, *purpose: str | int) -> np.random.Philox:
    key = "/".join(str(part) for part in (seed, *purpose)).encode()
    return np.random.Philox(key=int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))


def uniform_rows(rows: range, width: int, seed: int, *purpose: str | int) -> np.ndarray:
    """Consecutive rows (R, width), of float32 from 0 to 1, of a table of any number of rows; no others are drawn.

    Args:
        rows: indices of the rows; the table is as if it were drawn from its first row on.
        width: entries per row.
        seed: see `generator`.
        purpose: see `generator`.
    """
    bits = _philox(seed, *purpose)
    skipped, ahead = divmod(rows.start * width, PHILOX_FLOATS)
    bits.advance(skipped)
    return np.random.Generator(bits).random(ahead + len(rows) * width, np.float32)[ahead:].reshape(len(rows), width)


NORMAL = "normal_"
"""Begins the names of noise that is normally distributed; other noise is uniform."""


def is_normal(name: str) -> bool:
    """Whether the noise of this name, with or without that of a sub-layer before a dot, is normally distributed."""
    return name.rpartition(".")[2].startswith(NORMAL)


def noise_rows(name: str, rows: range, width: int, seed: int, *purpose: str | int) -> np.ndarray:
    """Noise of sequences of one step: uniform from 0 to 1, or of mean 0 and variance 1. Arguments as in `uniform_rows`.

    The normal numbers are by Box and Muller, from two uniform ones each.
    """
    uniform = uniform_rows(rows, width, seed, *purpose, name)
    if not is_normal(name):
        return uniform
    radius = np.sqrt(-2 * np.log1p(-uniform.astype(np.float64)))
    turn = uniform_rows(rows, width, seed, *purpose, name, "turn").astype(np.float64)
    return (radius * np.cos(2 * np.pi * turn)).astype(np.float32)


class InitialWeights(Weights):
    """Initial values of parameters, float32, drawn when they are read and only where.

    Values of a normal distribution are drawn in blocks: every expert by itself, and of it, or of any other parameter,
    as many rows as have at most BLOCK_ENTRIES. Each block has its own generator, keyed by seed, name and number of the
    block, so the values depend on no other parameter, on no number of ranks and on no number of threads.

    Args:
        specs: all parameters.
        seed: shared by all parameters.
        token_counts: counts (V,) of each token id in the training set, for tables indexed by token id; called once, and
            only if such a table is read. None: all ids equally often.
        threads: how many blocks are drawn at a time.
    """

    def __init__(
        self,
        specs: Iterable[ParameterSpec],
        seed: int,
        token_counts: Callable[[], np.ndarray] | None = None,
        threads: int = 1,
    ):
        self.specs = {spec.name: spec for spec in specs}
        self.seed, self.token_counts, self.threads = seed, token_counts, threads

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape

    @override
    def dtype(self, name: str) -> str:
        return "float32"

    @property
    @override
    def names(self) -> Collection[str]:
        return self.specs

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        spec = self.specs[name]
        if callable(spec.init):
            return spec.init(generator(self.seed, "parameter", name), self._counts(spec)).astype(np.float32)[box.slices]
        if spec.init != "normal":
            return np.full(box.shape, 1 if spec.init == "ones" else 0, np.float32)
        out = np.empty(box.shape, np.float32)
        numbers = list(_blocks(spec, box))
        draw = partial(self._draw, spec, box, out)
        threads = min(self.threads, len(numbers), math.ceil(box.size / WORTH_A_THREAD))
        if threads <= 1:
            list(map(draw, numbers))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(draw, numbers))
        return out

    def _draw(self, spec: ParameterSpec, box: Box, out: np.ndarray, number: tuple[int, ...]) -> None:
        """Write into `out`, which is what `box` is of a parameter, what it has of a block."""
        block = _block(spec, number)
        common = block.intersection(box)
        assert common is not None  # `number` is one of those that `_blocks` gives
        random, target = generator(self.seed, "parameter", spec.name, *number), out[common.within(box).slices]
        whole = common == block and target.flags.c_contiguous
        drawn = target if whole else np.empty(block.shape, np.float32)
        random.standard_normal(dtype=np.float32, out=drawn)
        drawn *= np.float32(spec.std)
        if not whole:
            target[...] = drawn[common.within(block).slices]

    @cached_property
    def _counted(self) -> np.ndarray | None:
        return self.token_counts() if self.token_counts else None

    def _counts(self, spec: ParameterSpec) -> np.ndarray:
        if self._counted is None:
            return np.ones(spec.shape[0], np.int64)
        counts_V = np.zeros(spec.shape[0], np.int64)
        counts_V[: len(self._counted)] = self._counted
        return counts_V


def _steps(spec: ParameterSpec) -> tuple[int, ...]:
    """Size of a block along the first dimensions; along the others it is whole, and at the end it may be smaller."""
    experts = (1,) if spec.is_expert else ()
    rows = max(1, BLOCK_ENTRIES // max(1, math.prod(spec.shape[len(experts) + 1 :])))
    return (*experts, rows)[: len(spec.shape)]


def _blocks(spec: ParameterSpec, box: Box) -> Iterator[tuple[int, ...]]:
    """Numbers of the blocks that a part meets: of the expert if it is of experts, and of the rows."""
    if box.size:
        of_dims = zip(_steps(spec), box.start, box.shape, strict=False)
        yield from product(*(range(first // step, -(-(first + count) // step)) for step, first, count in of_dims))


def _block(spec: ParameterSpec, number: tuple[int, ...]) -> Box:
    """The part of a parameter that a block is."""
    steps = _steps(spec)
    start = tuple(n * step for n, step in zip(number, steps, strict=True))
    counts = (min(step, size - first) for step, size, first in zip(steps, spec.shape, start, strict=False))
    rest = spec.shape[len(steps) :]
    return Box((*start, *(0 for _ in rest)), (*counts, *rest))


def initial_value(spec: ParameterSpec, seed: int, token_counts_V: np.ndarray | None = None) -> np.ndarray:
    """The initial value of one parameter, whole; see `InitialWeights`."""
    counts = None if token_counts_V is None else lambda: token_counts_V
    return InitialWeights([spec], seed, counts)[spec.name]


def initial_parameters(
    specs: Iterable[ParameterSpec], seed: int, token_counts: Callable[[], np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The initial values of all parameters by name, whole; see `InitialWeights`."""
    return dict(InitialWeights(specs, seed, token_counts))


def with_prefix(prefix: str, specs: Iterable[ParameterSpec]) -> list[ParameterSpec]:
    """The same specs with `prefix.` before their names."""
    return [replace(spec, name=f"{prefix}.{spec.name}") for spec in specs]


def subtree(prefix: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters whose names begin with `prefix.`, with that prefix removed."""
    cut = len(prefix) + 1
    return {name[cut:]: value for name, value in params.items() if name.startswith(f"{prefix}.")}
