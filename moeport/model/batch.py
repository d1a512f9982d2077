"""A batch of examples. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moeport.core.array import Array

ArrayT = TypeVar("ArrayT", bound=Array)
"""np.ndarray for a batch on the host, Array for one on the device."""


@dataclass(frozen=True)
class Batch(Generic[ArrayT]):
    """Examples, on the host or as arrays of a backend."""

    token_BS: ArrayT
    """Input ids (B, S); for images the patches, (B, S, P) floats."""
    target_BS: ArrayT
    """Next ids (B, S); for images the classes, (B, 1)."""
    noise: Mapping[str, ArrayT] = field(default_factory=dict)
    """Uniform random numbers (B, S) by `layer.name`, for routers that use them; empty outside training."""
