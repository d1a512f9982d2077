"""Parameters by name, and random numbers that are the same on every backend.

A model is a flat dict of dotted names to arrays. Initial values and routing noise come from numpy's counter-based
Philox generator, keyed by their purpose, so that every backend sees the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

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
    """False for state that the router updates itself without gradients, and for tables indexed by token id."""
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
    def is_expert(self) -> bool:
        """Whether its first dimension runs over the routed experts, which may be divided among ranks."""
        return "experts" in self.name.split(".")[:-1]

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, but not to norms and vectors."""
        return self.trainable and len(self.shape) >= 2


def parameter_dtype(dtype: str) -> str:
    """Type of parameters and optimiser state for a compute type: float64 for float64, otherwise float32."""
    return "float64" if dtype == "float64" else "float32"


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A Philox generator keyed by `seed` and `purpose`; equal keys give equal numbers on every machine."""
    key = "/".join(str(part) for part in (seed, *purpose)).encode()
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))
    )


def initial_value(spec: ParameterSpec, seed: int, token_counts_V: np.ndarray | None = None) -> np.ndarray:
    """The initial value of one parameter, float32; depends on nothing but the arguments.

    Args:
        spec: name, shape and kind.
        seed: shared by all parameters; each draws from a generator keyed by its own name.
        token_counts_V: how often each token id occurs in the training set, for tables indexed by token id; None: all
            ids equally often.
    """
    random = generator(seed, "parameter", spec.name)
    if callable(spec.init):
        counts_V = np.ones(spec.shape[0], np.int64)
        if token_counts_V is not None:
            counts_V[:] = 0
            counts_V[: len(token_counts_V)] = token_counts_V
        return spec.init(random, counts_V).astype(np.float32)
    if spec.init == "ones":
        return np.ones(spec.shape, np.float32)
    if spec.init == "zeros":
        return np.zeros(spec.shape, np.float32)
    return random.standard_normal(spec.shape, np.float32) * np.float32(spec.std)


def initial_parameters(
    specs: Iterable[ParameterSpec], seed: int, token_counts: Callable[[], np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Initial values of all parameters by name, float32.

    Args:
        specs: all parameters.
        seed: see `initial_value`.
        token_counts: counts ids in the training set; called only if a parameter needs them.
    """
    specs = list(specs)
    counts_V = token_counts() if token_counts and any(spec.is_table for spec in specs) else None
    return {spec.name: initial_value(spec, seed, counts_V) for spec in specs}


def with_prefix(prefix: str, specs: Iterable[ParameterSpec]) -> list[ParameterSpec]:
    """The same specs with `prefix.` before their names."""
    return [replace(spec, name=f"{prefix}.{spec.name}") for spec in specs]


def subtree(prefix: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters whose names begin with `prefix.`, with that prefix removed."""
    cut = len(prefix) + 1
    return {name[cut:]: value for name, value in params.items() if name.startswith(f"{prefix}.")}
