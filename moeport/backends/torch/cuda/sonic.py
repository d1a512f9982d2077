"""SonicMoE (Guo et al. 2025, arXiv 2512.14080), an optional package, as a form of `routed_mlp`. Not run on hardware.

It is called as its release 0.1.2 documents: `sonicmoe.moe_general_routing_inputs` takes routing that was decided
elsewhere, and `concat_layout` says that the rows of the gate come before those that it multiplies, as moeport has them.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moeport.backends.torch.ops import TorchOps
from moeport.core.dispatch_plan import DispatchPlan
from moeport.errors import MoeportError

ENTRY = "moe_general_routing_inputs"
NEEDS = ("router_scores", "token_indices", "expert_indices", "concat_layout")
"""Parameters of the entry that a release must have."""
INSTALL = "pip install --no-deps sonic-moe 'quack-kernels>=0.3.11' 'nvidia-cutlass-dsl==4.4.2'"
"""Without dependencies, since its releases name older ones of PyTorch than moeport needs."""


def routed_mlp(
    ops: TorchOps,
    x_TD: Tensor,
    weight_N: Tensor,
    plan: DispatchPlan,
    w_in: Tensor,
    w_out_EDF: Tensor,
    activation: str,
) -> Tensor:
    """All assignments are given in token order, as it asks; it sorts them by expert itself."""
    run, swiglu = _entry()
    arrays: Any = plan
    stream = torch.cuda.current_stream(x_TD.device).cuda_stream if x_TD.is_cuda else 0
    row_R = torch.arange(arrays.order_R.shape[0], device=x_TD.device)
    expert_R = torch.searchsorted(arrays.counts_E.cumsum(0), row_R, right=True, out_int32=True)
    y_TD, _ = run(
        x_TD.contiguous(),
        weight_N.float(),
        (row_R // (plan.choices_per_token or 1)).to(torch.int32),
        expert_R.index_select(0, arrays.position_N),
        w_in.to(x_TD.dtype).permute(1, 2, 0),
        None,
        w_out_EDF.to(x_TD.dtype).permute(1, 2, 0),
        None,
        w_in.shape[0],
        stream,
        swiglu,
        False,
        concat_layout=True,
    )
    return y_TD


def limit(
    x_TD: Tensor, weight_N: Tensor, plan: DispatchPlan, w_in: Tensor, w_out_EDF: Tensor, activation: str
) -> str | None:
    """What its interface cannot say, or does not promise."""
    width, hidden = w_out_EDF.shape[1:]
    if plan.choices_per_token is None:
        return "experts choose tokens, or rows are rounded; expected K rows per token"
    if not plan.serves_every_row:
        return "assignments may be unrouted; expected a router and a capacity that serve all"
    if activation != "swiglu":
        return f"the activation is {activation}; expected swiglu"
    if width % 8 or hidden % 8:
        return f"the widths are {width} and {hidden}; expected multiples of 8"
    if torch.are_deterministic_algorithms_enabled():
        return "it does not promise the same bits in every run; expected backend.deterministic: false"
    return None


def _entry() -> tuple[Any, Any]:
    """The function and its word for SwiGLU. Raises MoeportError if the package is not there, or not as documented."""
    try:
        entry = getattr(import_module("sonicmoe"), ENTRY, None)
        swiglu = import_module("sonicmoe.enums").ActivationType.SWIGLU
    except ImportError as error:
        raise MoeportError(f"sonic-moe cannot be imported ({error}); {INSTALL}") from None
    missing = [name for name in NEEDS if entry is None or name not in inspect.signature(entry).parameters]
    if missing:
        raise MoeportError(f"this sonic-moe has no {ENTRY} with {missing[0]}; expected 0.1.2 or later")
    return entry, swiglu
