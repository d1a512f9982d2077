"""The parts of a training step, and the kinds of work that a profile sums them up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS: Mapping[str, str] = {
    "expert_products": "expert products",
    "dense_products": "dense products",
    "attention": "attention",
    "router": "router",
    "permutation": "permutation",
    "elementwise": "norms and elementwise",
    "loss": "embedding, loss, metrics",
    "optimizer": "optimiser",
    "communication": "communication, exposed",
    "host": "data and host",
    "other": "other",
    "idle": "idle",
}
"""Every kind of work, with the name that tables show."""


@dataclass(frozen=True)
class Part:
    """What a part of the step is counted as."""

    kind: str
    """One of KINDS."""
    whole: bool = False
    """Whether everything inside counts as this kind, whatever parts it has; communication excepted."""
    products: str = ""
    """Kind of the matrix products inside, if it is another one."""
    moves: str = ""
    """Kind of what only moves rows inside (gather, sort, scatter), if it is another one."""
    waits: str = ""
    """Kind of the time inside that no operation takes, if it is another one."""


_EXPERTS = Part("elementwise", products="expert_products", moves="permutation", waits="expert_products")
_DENSE = Part("elementwise", products="dense_products", waits="dense_products")
_ELEMENTWISE = Part("elementwise", products="dense_products")
_LOSS = Part("loss", whole=True)

PARTS: Mapping[str, Part] = {
    # marked by neutral code
    "embedding": _LOSS,
    "block": Part("elementwise", products="dense_products", waits="host"),
    "router": Part("router", whole=True),
    "dispatch": Part("permutation"),
    "measures": _LOSS,
    "loss": _LOSS,
    "optimizer": Part("optimizer", whole=True),
    "communication": Part("communication", whole=True),
    # kernels of Ops
    "linear": _DENSE,
    "linear_accurate": _DENSE,
    "mlp": _DENSE,
    "rms_norm": _ELEMENTWISE,
    "swiglu": _ELEMENTWISE,
    "gelu": _ELEMENTWISE,
    "rope": Part("attention"),
    "attention": Part("attention", whole=True),
    "cached_attention": Part("attention", whole=True),
    "grouped_mlp": _EXPERTS,
    "routed_mlp": _EXPERTS,
    "sort_by_group": Part("permutation", whole=True),
    "inverse": Part("permutation", whole=True),
    "permute": Part("permutation", whole=True),
    "unpermute": Part("permutation", whole=True),
    "cross_entropy": _LOSS,
    "linear_cross_entropy": _LOSS,
    "linear_cross_entropy_by_token": _LOSS,
}
"""What each part is counted as: the blocks marked by `Ops.part`, and the kernels of `Ops`. Of nested parts the
innermost one counts, unless one around it counts as a whole."""
