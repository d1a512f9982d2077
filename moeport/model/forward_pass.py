"""How one forward pass is computed. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moeport.core.array import Array
from moeport.core.ops import AttentionOptions, Ops
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
    """Cosine and sine (S, A) of the batch's sequence length, from `Transformer.rope`; (B, S, A) of a continuation, and
    within `Transformer.hidden` where positions count from the beginnings of documents. With a base per key-value head,
    G A in place of A.
    """
    training: bool = False
    """Whether routers may draw noise."""
    number: int = 0
    """Which of the router's `passes` this is, from 0."""
    run_block: RunBlock | None = None
    """How to run a block; None: with the parameters passed to the model."""
    continuation: Continuation | None = None
    """Where the tokens are in texts whose earlier positions are in a cache; None: whole sequences."""
    document_BS: Array | None = None
    """That of the batch, which `Transformer.hidden` sets."""

    def in_block(self, layer: int) -> Pass:
        """The same pass in a block."""
        if self.continuation is None:
            return self
        return replace(self, continuation=replace(self.continuation, layer=layer))

    def rotated(self, x_BSHA: Array) -> Array:
        """Queries or keys, turned by the angles of their positions.

        With a base per key-value head, each of them, or the query heads that read it, takes the place of a position, so
        that every form of the kernel serves.
        """
        ops, (batch, sequence, heads, width) = self.ops, x_BSHA.shape
        groups = self.rope[0].shape[-1] // width
        if groups == 1:
            return ops.rope(x_BSHA, *self.rope)
        x = ops.reshape(x_BSHA, (batch, sequence * groups, heads // groups, width))
        cos, sin = (ops.reshape(table, (*table.shape[:-2], sequence * groups, width)) for table in self.rope)
        return ops.reshape(ops.rope(x, cos, sin), (batch, sequence, heads, width))

    def attend(
        self, q_BSHA: Array, k_BSGA: Array, v_BSGW: Array, causal: bool = True, scale: float | None = None
    ) -> Array:
        """Attention within sequences or their documents, or in a continuation also to earlier positions of the texts.

        Args and result as of `Ops.attention` and its options.
        """
        if self.continuation is None:
            return self.ops.attention(q_BSHA, k_BSGA, v_BSGW, AttentionOptions(causal, scale, self.document_BS))
        return self.continuation.attend(self.ops, q_BSHA, k_BSGA, v_BSGW, scale)
