"""What of a model is compiled: each block, without what ranks exchange in it.

An exchange stays outside of the graphs: its sizes change with every step, and a communicator watches the other ranks
from a thread of its own. So do experts whose weights are gathered from other ranks.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule

from moeport.backends.torch.module import ExpertsModule, TransformerModule
from moeport.core.array import Array
from moeport.core.dispatch import Exchange, Experts
from moeport.core.ops import Ops
from moeport.core.routing import Routing
from moeport.model.transformer import Transformer

COMPILER = "inductor"
"""The backend of torch.compile."""


def compile_blocks(module: TransformerModule, model: Transformer) -> None:
    """Compile the blocks of a model, which has been spread and distributed if it is to be.

    Their hooks, which gather weights, and the recomputation of activations are not compiled.

    Args:
        module: holds the parameters.
        model: its layers' exchanges are replaced.
    """
    for moe in model.moe_layers.values():
        if moe.exchange is not None:
            moe.exchange = BetweenGraphs(moe.exchange)
        if moe.mean_over_ranks is not None:
            moe.mean_over_ranks = torch.compiler.disable(moe.mean_over_ranks)
    for part in module.modules():
        if isinstance(part, ExpertsModule) and isinstance(part, FSDPModule):
            part.forward = torch.compiler.disable(part.forward)  # type: ignore[method-assign]
    for block in module.layers:
        block._run = torch.compile(block._run, backend=COMPILER)


class BetweenGraphs:
    """An exchange that no graph holds."""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange

    @torch.compiler.disable
    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """See `moeport.core.dispatch.Exchange`."""
        return self.exchange(ops, x_TD, routing, experts)

    @torch.compiler.disable
    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """See `moeport.core.dispatch.Exchange`."""
        return self.exchange.of_rows(ops, x_RD, counts_E, experts)
