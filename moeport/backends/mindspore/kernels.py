"""Fused operators of MindSpore, which are tried before they are used.

They are public functions of `mindspore.ops` that exist on Ascend but not on the CPU target. Each is used on a device
only if it reproduces the values and gradients of the default composition there: after a missing kernel, a different
layout or a wrong result of some driver release, the composition is used, and `kernel_choices` says why.

Not run on hardware: on the CPU all of them are refused because they have no kernel, which is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import ops as msops

from moeport.backends.examples import differentiated_among
from moeport.backends.mindspore.ops import MindSporeOps
from moeport.backends.trial import AUTO, Candidate, Choice, choose, fault_of, serves_all
from moeport.core.ops import CAUSAL, AttentionOptions
from moeport.facts import BACKENDS

OpsT = TypeVar("OpsT", bound=MindSporeOps)


def rms_norm(ops: MindSporeOps, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """mindspore.ops.rms_norm."""
    y = ops.accurate(x)
    return ops.cast(msops.rms_norm(y, ops.cast(weight, ops.dtype(y)), eps)[0], ops.dtype(x))


def swiglu(ops: MindSporeOps, gate_up: Tensor) -> Tensor:
    """mindspore.ops.swiglu."""
    return msops.swiglu(gate_up, -1)


def rope(ops: MindSporeOps, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """mindspore.ops.rotary_position_embedding, mode 0 (halves)."""
    x = ops.accurate(x_BSHA)
    shape = (-1, x.shape[1], 1, x.shape[3])
    cos, sin = (msops.reshape(ops.cast(table, ops.dtype(x)), shape) for table in (cos_SA, sin_SA))
    return ops.cast(msops.rotary_position_embedding(x, cos, sin, 0), ops.dtype(x_BSHA))


def attention(
    ops: MindSporeOps,
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> Tensor:
    """mindspore.ops.flash_attention_score in layout BSND, with a mask (True: hidden) if causal or of documents."""
    sequence, heads, width = q_BSHA.shape[1:]
    hidden = Tensor(np.triu(np.ones((sequence, sequence), bool), 1)) if options.causal else None
    document_BS = options.document_BS
    if document_BS is not None:
        others = msops.expand_dims(document_BS, 2) != msops.expand_dims(document_BS, 1)
        hidden = msops.expand_dims(others if hidden is None else msops.logical_or(others, hidden), 1)
    return msops.flash_attention_score(
        q_BSHA,
        k_BSGA,
        v_BSGW,
        heads,
        attn_mask=hidden,
        scalar_value=width**-0.5 if options.scale is None else options.scale,
        input_layout="BSND",
    )


def attention_limit(
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> str | None:
    """Of flash_attention_score, whose documentation has one width for queries, keys and values."""
    width, value_width = q_BSHA.shape[-1], v_BSGW.shape[-1]
    return None if width == value_width else f"values have the width {value_width}, and queries and keys {width}"


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mindspore.ops.rms_norm": rms_norm,
    "mindspore.ops.swiglu": swiglu,
    "mindspore.ops.rotary_position_embedding": rope,
    "mindspore.ops.flash_attention_score": attention,
}
"""How each operator of the table of facts is called."""

LIMITS: dict[str, Callable[..., str | None]] = {"mindspore.ops.flash_attention_score": attention_limit}
"""What some of them cannot serve."""

CANDIDATES = tuple(
    Candidate(fact, FUNCTIONS[fact.name], LIMITS.get(fact.name, serves_all))
    for fact in BACKENDS["mindspore"].fused_on("npu")
)


def try_fused(ops: MindSporeOps, dtype: str, setting: str | Mapping[str, str] = AUTO) -> dict[str, Choice]:
    """Try every candidate on the device in a compute type.

    Args:
        ops: operations with the compositions.
        dtype: compute type.
        setting: `backend.kernels`.

    Returns: the choice by kernel.
    """
    kernels = dict.fromkeys(candidate.fact.kernel for candidate in CANDIDATES)
    attempt = partial(fault_of, ops=ops, dtype=dtype, evaluate=_value_and_gradients)
    return {kernel: choose(kernel, CANDIDATES, setting, attempt) for kernel in kernels}


def with_fused(ops: OpsT, choices: Mapping[str, Choice]) -> OpsT:
    """The same operations with the fused forms that passed."""
    chosen = {
        kernel: _within_limit(choice.candidate, getattr(type(ops), kernel))
        for kernel, choice in choices.items()
        if choice.candidate
    }
    if not chosen:
        return ops
    kind: Any = type(f"Fused{type(ops).__name__}", (type(ops),), chosen)
    fused: OpsT = kind.__new__(kind)
    vars(fused).update(vars(ops))
    return fused


def _within_limit(candidate: Candidate, composed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A fused form, and the composition for arguments that it cannot serve."""
    if candidate.limit is serves_all:
        return candidate.function

    def kernel(ops: MindSporeOps, *arguments: Any, **options: Any) -> Tensor:
        form = composed if candidate.limit(*arguments, **options) else candidate.function
        return form(ops, *arguments, **options)

    return kernel


def _value_and_gradients(
    ops: Any, function: Callable[..., Tensor], arguments: Sequence[Any], differentiated: int
) -> list[np.ndarray | None]:
    """Implements `moeport.backends.trial.Evaluate`."""
    ops.to_numpy(function(*arguments))  # a kernel that fails under differentiation leaves MindSpore in a bad state

    def weighted(*args: Any) -> Any:
        out = ops.accurate(function(*args))
        weight = np.random.default_rng(1).standard_normal(out.shape).astype(ops.dtype(out))
        return (out * Tensor(weight)).sum(), out

    positions = differentiated_among(arguments, differentiated)
    (_, out), found = ms.value_and_grad(weighted, positions, None, has_aux=True)(*arguments)
    gradients = found if isinstance(found, tuple) else (found,)
    return [None if x is None else ops.to_numpy(x) for x in (out, *gradients)]
