"""How one forward pass is computed. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext
from moeport.model.moe_metrics import MoEMetrics

BlockOutput = tuple[Array, tuple[MoEMetrics, ...]]
"""x_BSD after a block, and the metrics of its mixture-of-experts layers; none for a dense block."""
RunBlock = Callable[["Pass", Array, RouterContext], BlockOutput]
"""How a backend runs the block `context.layer` on x_BSD: from its module, recomputed, compiled."""


@dataclass(frozen=True)
class Pass:
    """How a forward pass is computed: the same for every block. `Transformer.forward_pass` makes one."""

    ops: Ops
    """The backend's operations."""
    dtype: str
    """Compute type, one of FLOAT_DTYPES."""
    rope: tuple[Array, Array]
    """Cosine and sine (S, A) of the batch's sequence length, from `Transformer.rope`."""
    training: bool = False
    """Whether routers may draw noise."""
    number: int = 0
    """Which of the router's `passes` this is, from 0."""
    run_block: RunBlock | None = None
    """How to run a block; None: with the parameters passed to the model."""
