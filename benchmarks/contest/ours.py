"""moeport's own layer with each choice of kernels that the device has, and what limits any layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from contest.contender import Contender, Layer
from contest.problem import Problem
from moeport.facts import BACKENDS

KERNELS = ("routed_mlp", "grouped_mlp", "permute", "unpermute", "swiglu")
"""Kernels of `Ops` that a layer of experts is made of."""
PRODUCT = {"cpu": 1024}
"""Rows and columns of the large matrix product by device; 8192 elsewhere."""


def moeport_layer(kernels: str | Mapping[str, str]) -> Callable[[Problem], Layer]:
    """Builds `moeport.torch.MoE` with these kernels."""

    def build(problem: Problem) -> Layer:
        from moeport.torch import MoE

        shape = problem.shape
        layer = MoE(  # on the meta device nothing is drawn
            shape.width,
            shape.experts,
            shape.hidden,
            router="topk",
            router_options={"top_k": shape.top_k},
            capacity="dropless",
            load_balance={"coefficient": 0.0},
            device="meta",
            dtype=problem.dtype,
            kernels=kernels,
        )
        layer.experts.w_in, layer.experts.w_out, layer.router.weight = problem.w_in, problem.w_out, problem.router
        assert not [name for name, x in (*layer.named_parameters(), *layer.named_buffers()) if x.is_meta]
        return Layer(layer.train(), problem.weights)

    return build


def ours(device: str) -> list[Contender]:
    """The layer as users get it, without fused operators, and with each of them by name."""
    found = [
        Contender("moeport", moeport_layer("auto"), group="ours"),
        Contender("moeport default", moeport_layer("default"), group="ours"),
    ]
    for fact in BACKENDS["torch"].fused_on(device):
        if fact.kernel in KERNELS:
            # The experts alone are computed where nothing computes the experts and the gathering around them.
            alone = {"routed_mlp": "default"} if fact.kernel != "routed_mlp" else {}
            build = moeport_layer({**alone, fact.kernel: fact.name})
            dtypes = tuple(getattr(torch, dtype) for dtype in fact.dtypes)
            found.append(Contender(f"moeport {fact.kernel}={fact.name}", build, dtypes=dtypes, group="ours"))
    return found


def dense(problem: Problem) -> Layer:
    """A SwiGLU block of width D to k F to D: the FLOPs of the layer without routing."""
    shape, hidden = problem.shape, problem.shape.top_k * problem.shape.hidden
    w_in = torch.randn(2 * hidden, shape.width, device=problem.device, dtype=problem.dtype).mul_(shape.width**-0.5)
    w_out = torch.randn(shape.width, hidden, device=problem.device, dtype=problem.dtype).mul_(hidden**-0.5)
    parameters = [nn.Parameter(w_in), nn.Parameter(w_out)]

    def run(x_TD: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x_TD, parameters[0]).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, parameters[1])

    return Layer(run, parameters)


def product(problem: Problem) -> Layer:
    """One large square matrix product."""
    size = PRODUCT.get(problem.device.type, 8192)
    a, b = (torch.randn(size, size, device=problem.device, dtype=problem.dtype) for _ in range(2))
    return Layer(lambda x_TD: torch.mm(a, b), [], backward=False)


def product_flops(device: str) -> float:
    """FLOPs of `product`."""
    return 2.0 * PRODUCT.get(device, 8192) ** 3


LIMITS = [
    Contender("dense MLP", dense, group="limit", differs="has no experts"),
    Contender("large product", product, group="limit", differs="is one matrix product"),
]
