"""The table of fused kernels for CUDA: how each kernel of `Ops` is served, and what is beyond it.

Not run on hardware.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeport.backends.torch.cuda import attention, norm_rope, sonic
from moeport.backends.torch.cuda.block import expert_block
from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.limits import tokens_choose
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import Candidate, serves_all
from moeport.core.dispatch_plan import DispatchPlan
from moeport.errors import MoeportError
from moeport.facts import BACKENDS

CAPABILITIES = {"triton": range(8, 100)} | dict.fromkeys(
    ("grouped_mm", "grouped_mm_triton", "mixed", "sonicmoe"), range(9, 11)
)
"""Major compute capabilities of each form. On others torch's grouped product is a loop that waits for the counts."""
MAX_GROUPS = 1024
"""The experts of torch's grouped product are fewer."""
ALIGNMENT = 16
"""Bytes of which the rows of its matrices are multiples."""


def routed_mlp(
    ops: TorchOps,
    x_TD: Tensor,
    weight_N: Tensor,
    plan: DispatchPlan,
    w_in: Tensor,
    w_out_EDF: Tensor,
    activation: str,
    form: str,
) -> Tensor:
    """From tokens to tokens in one node."""
    require(form, x_TD.device)
    arrays: Any = plan
    layout = Layout(
        _ends(arrays.counts_E), plan.serves_every_row, arrays.order_R, arrays.position_N, plan.choices_per_token or 1
    )
    return expert_block(x_TD, weight_N, w_in.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype), layout, activation, form)


def routed_mlp_limit(
    x_TD: Tensor, weight_N: Tensor, plan: DispatchPlan, w_in: Tensor, w_out_EDF: Tensor, activation: str
) -> str | None:
    """Of torch's grouped product, and of a sum over the rows of a token."""
    return tokens_choose(x_TD, weight_N, plan, w_in, w_out_EDF, activation) or _product_limit(x_TD, w_out_EDF)


def grouped_mlp(
    ops: TorchOps, x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str, form: str
) -> Tensor:
    """From rows to rows in one node."""
    require(form, x_RD.device)
    layout = Layout(_ends(counts_E), whole=False)
    return expert_block(x_RD, None, w_in.to(x_RD.dtype), w_out_EDF.to(x_RD.dtype), layout, activation, form)


def grouped_mlp_limit(x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str) -> str | None:
    """Of torch's grouped product."""
    return _product_limit(x_RD, w_out_EDF)


def sonic_routed_mlp(ops: TorchOps, x_TD: Tensor, *rest: Any) -> Tensor:
    """By an optional package."""
    require("sonicmoe", x_TD.device)
    return sonic.routed_mlp(ops, x_TD, *rest)


def require(form: str, device: torch.device) -> None:
    """Raises MoeportError if a form has no kernel for a device, or only one that waits for it."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    allowed, (major, minor) = CAPABILITIES[form], _capability(device)
    if major not in allowed:
        expected = "9 or 10" if form != "triton" else "8 or later"
        raise MoeportError(f"needs compute capability {expected}; this device has {major}.{minor}")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0, dtype=torch.int32)


def _product_limit(x: Tensor, w_out_EDF: Tensor) -> str | None:
    experts, width, hidden = w_out_EDF.shape
    unit = ALIGNMENT // x.element_size()
    if width % unit or hidden % unit:
        return f"the widths are {width} and {hidden}; expected multiples of {unit}"
    if experts >= MAX_GROUPS:
        return f"there are {experts} experts; expected fewer than {MAX_GROUPS}"
    return None


FUNCTIONS: Mapping[tuple[str, str], tuple[Callable[..., Any], Callable[..., str | None]]] = {
    ("routed_mlp", "grouped_mm_triton"): (partial(routed_mlp, form="grouped_mm_triton"), routed_mlp_limit),
    ("routed_mlp", "grouped_mm"): (partial(routed_mlp, form="grouped_mm"), routed_mlp_limit),
    ("routed_mlp", "mixed"): (partial(routed_mlp, form="mixed"), routed_mlp_limit),
    ("routed_mlp", "triton"): (partial(routed_mlp, form="triton"), tokens_choose),
    ("routed_mlp", "sonicmoe"): (sonic_routed_mlp, sonic.limit),
    ("grouped_mlp", "grouped_mm_triton"): (partial(grouped_mlp, form="grouped_mm_triton"), grouped_mlp_limit),
    ("grouped_mlp", "grouped_mm"): (partial(grouped_mlp, form="grouped_mm"), grouped_mlp_limit),
    ("grouped_mlp", "mixed"): (partial(grouped_mlp, form="mixed"), grouped_mlp_limit),
    ("grouped_mlp", "triton"): (partial(grouped_mlp, form="triton"), serves_all),
    ("rms_norm", "triton_rms_norm"): (norm_rope.rms_norm, norm_rope.rms_norm_limit),
    ("rope", "triton_rope"): (norm_rope.rope, norm_rope.rope_limit),
    ("attention", "flash_attention_3"): (attention.flash_attention_3, attention.flash_attention_3_limit),
    ("attention", "sdpa_cudnn"): (attention.cudnn, attention.cudnn_limit),
    ("attention", "sdpa_efficient"): (attention.efficient, attention.efficient_limit),
}
"""By kernel and name in the table of facts: how it is served, and what it cannot serve."""

EAGER_ONLY = ("sonicmoe", "triton_rms_norm", "triton_rope", "flash_attention_3")
"""Not for a compiled graph, whose compiler fuses norms and rope with what surrounds them."""

CANDIDATES = tuple(
    Candidate(fact, *FUNCTIONS[fact.kernel, fact.name], is_traceable=fact.name not in EAGER_ONLY)
    for fact in BACKENDS["torch"].fused_on("cuda")
)
"""In the order in which they are tried. Where several pass, time chooses: see `moeport.backends.timing`."""
