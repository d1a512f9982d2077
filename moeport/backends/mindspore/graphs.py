"""What a compiled model needs from its backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeport.backends.mindspore.kernels import Choice, with_fused
from moeport.backends.mindspore.static_ops import StaticOps
from moeport.backends.mindspore.trace import Compilations


@dataclass(frozen=True)
class Graphs:
    """Operations for graphs of fixed shapes, and a count of compiled graphs."""

    fused: Mapping[str, Choice]
    """Results of trying the fused kernels on the device."""
    compilations: Compilations = field(default_factory=Compilations)

    def ops(self, expert_rows: int, differentiable: bool) -> StaticOps:
        """Operations for a graph; arguments as for StaticOps."""
        return with_fused(StaticOps(expert_rows, differentiable), self.fused)
