"""A batch of examples. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeport.core.array import Array


@dataclass(frozen=True)
class Batch:
    """Examples, on the host or as arrays of a backend."""

    token_BS: Array
    """Input ids (B, S); of images the patches, (B, S, P) floats."""
    target_BS: Array
    """Next ids (B, S); of images the classes, (B, 1)."""
    noise: dict[str, Array] = field(default_factory=dict)
    """Uniform numbers (B, S) by `layer.name`, for routers that draw; empty outside training."""
