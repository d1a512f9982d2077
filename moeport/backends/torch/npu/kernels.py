"""The table of fused kernels for NPUs: how each kernel of `Ops` is computed by an operator of torch-npu.

The operators have derivatives of torch-npu's own, except npu_grouped_matmul, whose are here. Not run on hardware: the
tests run them over emulated kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moeport.backends.torch.documents import hidden_pairs
from moeport.backends.torch.npu import contract, operators
from moeport.backends.torch.npu.contract import first
from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.undisturbed import undisturbed
from moeport.backends.trial import Candidate, serves_all
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import CAUSAL, AttentionOptions
from moeport.facts import BACKENDS

Context = Any


def rms_norm(ops: TorchOps, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The operator takes x in the compute type and a weight in float32, and computes in float32."""
    return operators.rms_norm(x, weight.to(torch.float32), eps)


def rms_norm_limit(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """Of npu_rms_norm."""
    return first(contract.rms_norm(x, weight))


def rope(ops: TorchOps, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """In float32, as the composition: tables in a narrower type would round the angles."""
    x = ops.accurate(x_BSHA).contiguous()
    cos, sin = (table.to(x.dtype).reshape(-1, x.shape[1], 1, x.shape[3]) for table in (cos_SA, sin_SA))
    return operators.rotary_mul(x, cos, sin).to(x_BSHA.dtype)


def rope_limit(x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> str | None:
    """Of npu_rotary_mul."""
    return first(contract.heads(x_BSHA))


def attention(
    ops: TorchOps,
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> Tensor:
    """In the layout of the arguments, so that nothing is transposed; with documents, under a mask of all pairs."""
    mask = _causal_mask(q_BSHA) if options.causal else None
    if options.document_BS is not None:
        mask = hidden_pairs(options.document_BS, options.causal)
    return operators.fusion_attention(q_BSHA, k_BSGA, v_BSGW, mask, options.scale)


def attention_limit(
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> str | None:
    """Of npu_fusion_attention."""
    return first(contract.attention(q_BSHA, k_BSGA, v_BSGW))


def swiglu(ops: TorchOps, gate_up: Tensor) -> Tensor:
    """The operator takes no strided tensor."""
    return operators.swiglu(gate_up.contiguous())


def swiglu_limit(gate_up: Tensor) -> str | None:
    """Of npu_swiglu."""
    return first(contract.swiglu(gate_up))


def permute(ops: TorchOps, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """The operator sorts the rows by indices: here those of the plan, so that it cannot order ties differently."""
    return operators.token_permute(x_TD, _positions(plan))


def permute_limit(x_TD: Tensor, plan: DispatchPlan) -> str | None:
    """Of npu_moe_token_permute."""
    return first(contract.assignments(plan.num_tokens, plan.choices_per_token, plan.counts_E.shape[0]))


def unpermute(ops: TorchOps, y_RD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> Tensor:
    """The operator calls sorted_indices what the plan calls positions: the row of each assignment."""
    position_TK = _positions(plan)
    return operators.token_unpermute(y_RD, position_TK.flatten(), weight_N.to(y_RD.dtype).view_as(position_TK))


def unpermute_limit(y_RD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> str | None:
    """Of npu_moe_token_unpermute."""
    return permute_limit(y_RD, plan)


def grouped_mlp(
    ops: TorchOps, x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str
) -> Tensor:
    """Two grouped products with the activation between them, without waiting for the counts.

    The operator wants every row of x in a group. Rows behind the last group are therefore set to 0 and given to the
    last expert: their results are 0, and so is all that they add to gradients.
    """
    rows = x_RD.shape[0]
    served_R1 = (torch.arange(rows, device=x_RD.device) < counts_E.sum()).unsqueeze(1)
    x_RD = torch.where(served_R1, x_RD, 0)
    w_in, w_out = w_in.to(x_RD.dtype), w_out_EDF.to(x_RD.dtype)
    others_E = counts_E[:-1]
    whole_E = torch.cat((others_E, (rows - others_E.sum()).unsqueeze(0)))
    hidden = _product(x_RD, w_in, whole_E)
    return _product(ops.swiglu(hidden) if activation == "swiglu" else ops.gelu(hidden), w_out, whole_E)


def grouped_mlp_limit(x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str) -> str | None:
    """Of npu_grouped_matmul."""
    return first(contract.experts(w_in.shape[0], *w_in.shape[1:], *w_out_EDF.shape[1:]))


class GroupedProduct(torch.autograd.Function):
    """x W_e^T for the rows of each expert e, with the derivative that npu_grouped_matmul lacks."""

    @staticmethod
    def forward(ctx: Context, x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        """The products (R, O); the counts add up to R."""
        ctx.save_for_backward(x_RI, weight_EOI, counts_E)
        return operators.grouped_matmul(x_RI, weight_EOI.mT, counts_E, group_type=0)

    @staticmethod
    def backward(ctx: Context, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows and of the weights.

        An expert without rows gets a gradient of zeros whatever the operator leaves there: the documentation does not
        say, and grouped products of other makers have left uninitialised memory.
        """
        x_RI, weight_EOI, counts_E = ctx.saved_tensors
        grad_RO, grad_x, grad_weight = grad_RO.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = operators.grouped_matmul(grad_RO, weight_EOI, counts_E, group_type=0)
        if ctx.needs_input_grad[1]:
            grad_weight = operators.grouped_matmul(grad_RO.t(), x_RI, counts_E, group_type=2)
            grad_weight = grad_weight.masked_fill_((counts_E == 0)[:, None, None], 0)
        return grad_x, grad_weight, None


FUNCTIONS: Mapping[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "npu_rms_norm": (rms_norm, rms_norm_limit),
    "npu_rotary_mul": (rope, rope_limit),
    "npu_fusion_attention": (attention, attention_limit),
    "npu_swiglu": (swiglu, swiglu_limit),
    "npu_grouped_matmul": (grouped_mlp, grouped_mlp_limit),
    "npu_moe_token_permute": (permute, permute_limit),
    "npu_moe_token_unpermute": (unpermute, unpermute_limit),
    "_fused_adamw_": (partial(torch.optim.AdamW, fused=True), serves_all),
}
"""How each operator of the table of facts serves its kernel, and what it cannot serve."""

CANDIDATES = tuple(Candidate(fact, *FUNCTIONS[fact.name]) for fact in BACKENDS["torch"].fused_on("npu"))
"""In the order in which they are tried."""


def _product(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """One group is no group list, but a plain product."""
    if weight_EOI.shape[0] == 1:
        return F.linear(x_RI, weight_EOI[0])
    return GroupedProduct.apply(x_RI, weight_EOI, counts_E)


def _positions(plan: DispatchPlan) -> Tensor:
    """The row of each assignment, as the operators take it. For `unpermute`, it is the inverse of the sorting order."""
    position_N: Any = plan.position_N
    return position_N.to(torch.int32).unflatten(0, (plan.num_tokens, -1))


_masks: dict[torch.device, Tensor] = {}


def _causal_mask(x: Tensor) -> Tensor:
    """Above the diagonal true, which means hidden; 4 MiB, and the same for all sizes, so each device has one."""

    def mask() -> Tensor:
        return torch.ones((contract.CAUSAL_MASK,) * 2, dtype=torch.bool, device=x.device).triu_(1)

    if type(x) is not Tensor or torch.compiler.is_compiling():  # a tensor without memory takes no real mask
        return mask()
    if x.device not in _masks:
        _masks[x.device] = undisturbed(x.device, mask)
    return _masks[x.device]
