"""Parameters by name, and numbers that every backend draws alike.

A model is a flat dict of dotted names to arrays. Initial values and routing noise come from numpy's counter-based
Philox generator, keyed by what they are for, so that every backend starts from and sees the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

Value = TypeVar("Value")


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and initial value of one parameter."""

    name: str
    shape: tuple[int, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    std: float = 0.02
    """Standard deviation of a normal init."""
    trainable: bool = True
    """False for state that the router updates itself, without gradients."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and vectors."""
        return self.trainable and len(self.shape) >= 2


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A Philox generator keyed by `seed` and `purpose`; equal keys give equal numbers on every machine."""
    key = "/".join(str(part) for part in (seed, *purpose)).encode()
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))
    )


def initial_value(spec: ParameterSpec, seed: int) -> np.ndarray:
    """The initial value of one parameter, float32; depends on the seed and the name alone."""
    if spec.init == "ones":
        return np.ones(spec.shape, np.float32)
    if spec.init == "zeros":
        return np.zeros(spec.shape, np.float32)
    values = generator(seed, "parameter", spec.name).standard_normal(spec.shape, np.float32)
    return values * np.float32(spec.std)


def initial_parameters(specs: Iterable[ParameterSpec], seed: int) -> dict[str, np.ndarray]:
    """Initial values of all parameters by name, float32."""
    return {spec.name: initial_value(spec, seed) for spec in specs}


def with_prefix(prefix: str, specs: Iterable[ParameterSpec]) -> list[ParameterSpec]:
    """The same specs with `prefix.` before their names."""
    return [replace(spec, name=f"{prefix}.{spec.name}") for spec in specs]


def under(prefix: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters whose names begin with `prefix.`, without it."""
    cut = len(prefix) + 1
    return {name[cut:]: value for name, value in params.items() if name.startswith(f"{prefix}.")}
