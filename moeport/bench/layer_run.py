"""A layer that is ready to run, and the check of its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops

TOLERANCES = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.05}
"""By compute type, how far a value may be from that of one process, relative to its magnitude plus the root mean square
of its array. Both compute the same products but sum them in different blocks and orders, so they differ by a few
roundings of the type. The largest differences seen were 1.5e-15, 1.2e-6 and 1.2e-2, in gradients of experts, and they
grow with the square root of the number of terms. A row that is lost, counted twice or sent to the wrong expert changes
a value by about the root mean square itself.

An array whose root mean square is at most the tolerance times the largest array's is only rounding error, such as the
gradient of a router whose only gate is normalised to 1. Its values need only be within ten times that limit."""


@dataclass(frozen=True)
class LayerRun:
    """A layer with one algorithm and tokens of one size, ready to run."""

    algorithm: str
    chunks: int
    tokens: int
    """Tokens per rank."""
    bytes: int
    """Their size."""
    type: str
    run: Callable[[], dict[str, Array]]
    """Returns the output, and with the backward pass the gradients of the tokens and of the parameters of this rank."""
    reference: Mapping[str, np.ndarray] | None
    """The same from one process with all experts; None: not computed."""
    ops: Ops

    def wrong(self, got: Mapping[str, Array]) -> int:
        """Number of elements that are too far from the reference."""
        wanted, tolerance, wrong = self.reference or {}, TOLERANCES[self.type], 0
        size = {name: float(np.sqrt(np.square(want).mean())) for name, want in wanted.items()}
        rounding = tolerance * max(size.values(), default=0.0)
        for name, want in wanted.items():
            limit = 10 * rounding if size[name] <= rounding else tolerance * (size[name] + np.abs(want))
            wrong += int((~(np.abs(self.ops.to_numpy(got[name]) - want) <= limit)).sum())
        return wrong
