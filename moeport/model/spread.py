"""A model whose experts are divided among the ranks of a mesh."""

from __future__ import annotations

from moeport.comm.exchange import EXCHANGES, CountedExchange
from moeport.comm.mesh import Mesh
from moeport.model.transformer import Transformer


def spread(model: Transformer, mesh: Mesh, algorithm: str, chunks: int) -> dict[str, CountedExchange]:
    """Tell the layers of a model where their experts are, and how tokens reach them.

    Args:
        model: each rank runs its part of it.
        mesh: which ranks share the experts.
        algorithm: a name in EXCHANGES.
        chunks: see `ExpertExchange`.

    Returns: the exchange of each MoE layer, by the names of `Transformer.moe_layers`; empty if every rank has all
    experts.
    """
    if mesh.world.size == 1:
        return {}
    model.topology = mesh.topology
    for moe in model.moe_layers.values():
        moe.mean_over_ranks = mesh.mean
    if mesh.experts.size == 1:
        return {}
    exchange = EXCHANGES[algorithm](mesh.experts, model.config.moe.num_experts, chunks)
    counted = {name: CountedExchange(exchange) for name in model.moe_layers}
    for name, moe in model.moe_layers.items():
        moe.exchange = counted[name]
    return counted
