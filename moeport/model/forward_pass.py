"""How one forward pass is computed. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext
from moeport.model.cache import Continuation
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
    """Cosine and sine (S, A) of the batch's sequence length, from `Transformer.rope`; (B, S, A) of a continuation."""
    training: bool = False
    """Whether routers may draw noise."""
    number: int = 0
    """Which of the router's `passes` this is, from 0."""
    run_block: RunBlock | None = None
    """How to run a block; None: with the parameters passed to the model."""
    continuation: Continuation | None = None
    """Where the tokens are in texts whose earlier positions are in a cache; None: whole sequences."""

    def in_block(self, layer: int) -> Pass:
        """The same pass in a block."""
        if self.continuation is None:
            return self
        return replace(self, continuation=replace(self.continuation, layer=layer))

    def rotated(self, x_BSHA: Array) -> Array:
        """Queries or keys, turned by the angles of their positions."""
        if self.continuation is None:
            return self.ops.rope(x_BSHA, *self.rope)
        flat = self.ops.reshape(x_BSHA, (1, -1, *x_BSHA.shape[2:]))
        cos, sin = (self.ops.reshape(table, (-1, table.shape[2])) for table in self.rope)
        return self.ops.reshape(self.ops.rope(flat, cos, sin), x_BSHA.shape)

    def attend(
        self, q_BSHA: Array, k_BSGA: Array, v_BSGW: Array, causal: bool = True, scale: float | None = None
    ) -> Array:
        """Attention within the sequences, or in a continuation also to the earlier positions of their texts.

        Args and result as of `Ops.attention`.
        """
        if self.continuation is None:
            return self.ops.attention(q_BSHA, k_BSGA, v_BSGW, causal, scale)
        return self.continuation.attend(self.ops, q_BSHA, k_BSGA, v_BSGW, scale)
