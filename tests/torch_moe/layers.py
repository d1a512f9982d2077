"""Layers with each router, and every option that has a branch of its own."""

from typing import Any

import torch

from moeport.routers import BY_NAME
from moeport.torch import MoE

D, E, F, V = 16, 8, 8, 50
STATEFUL: dict[str, dict[str, Any]] = {
    "bias": {"router": "sigmoid_bias"},
    "capacity": {"router": "topk", "capacity": {"policy": "locmoe_plus", "freeze_after": 400}},
    "both": {"router": "sigmoid_bias", "capacity": {"policy": "locmoe", "delta": "quantile"}},
}
"""Layers with state that `update_router_state` updates."""
EXTRAS = {
    "num_shared_experts": 1,
    "shared_mixing": "softmax",
    "residual_hidden": 8,
    "router_z_loss": 1e-3,
    "routed_scaling_factor": 2.0,
}


def make(router="topk", **options):
    """A layer; routers that look at ids get a table of 50."""
    if BY_NAME[router].config_class.needs_token_ids:
        options["vocab_size"] = V
    return MoE(D, E, F, router=router, **({"init_std": 0.3} | options))


def inputs(layer, *shape, seed=0, dtype=torch.float32, **options):
    """What the layer takes: x of a shape that ends before D, and ids if its router looks at them."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, D, generator=random).to(dtype).requires_grad_(**options)
    if not layer.layer.config.router.needs_token_ids:
        return (x,)
    return x, torch.randint(0, V, shape, generator=random)


def variants():
    """(name, router, options) of every router with every policy of capacity and of drops that it takes.

    What an estimated capacity measures does not depend on the router, so one router has all of it.
    """
    for router, row in BY_NAME.items():
        config = row.config_class
        yield router, router, {}
        yield f"{router}-extras", router, EXTRAS
        if config.fixed_load:
            continue
        for drop in ("position", "probability", "random", *(["affinity"] if config.has_affinity else [])):
            yield f"{router}-{drop}", router, {"capacity": {"policy": "factor", "drop": drop}}
        if config.has_gate_rows:
            for policy in ("locmoe", "locmoe_plus"):
                deltas = ("minimum", "quantile", "mean", "maximum")[: 4 if policy == "locmoe" else 2]
                for delta in deltas if router == "topk" else ("quantile",):
                    yield f"{router}-{policy}-{delta}", router, {"capacity": {"policy": policy, "delta": delta}}


def backward(layer, y):
    """Gradients of a loss in which the output and the auxiliary loss have a part."""
    (y.float().square().sum() + layer.auxiliary_loss).backward()
