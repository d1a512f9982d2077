"""Fused operators of MindSpore, which are tried before they are used.

They are public functions of `mindspore.ops` that exist on Ascend but not on the CPU target. Each is used on a device
only if it reproduces the values and gradients of the default composition there: after a missing kernel, a different
layout or a wrong result of some driver release, the composition is used, and `kernel_choices` says why.

Not run on hardware: on the CPU all of them are refused because they have no kernel, which is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import ops as msops

from moeport.backends.mindspore.ops import DTYPES, MindSporeOps

OpsT = TypeVar("OpsT", bound=MindSporeOps)

TOLERANCE = {"bfloat16": 2**-6, "float32": 1e-5, "float64": 1e-12}
"""Largest difference from the composition, relative to its largest value."""


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
    shape = (1, x.shape[1], 1, x.shape[3])
    cos, sin = (msops.reshape(ops.cast(table, ops.dtype(x)), shape) for table in (cos_SA, sin_SA))
    return ops.cast(msops.rotary_position_embedding(x, cos, sin, 0), ops.dtype(x_BSHA))


def attention(ops: MindSporeOps, q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor, causal: bool = True) -> Tensor:
    """mindspore.ops.flash_attention_score in layout BSND, with a mask (True: hidden) if causal."""
    sequence, heads, width = q_BSHA.shape[1:]
    future = Tensor(np.triu(np.ones((sequence, sequence), bool), 1)) if causal else None
    return msops.flash_attention_score(
        q_BSHA, k_BSGA, v_BSGA, heads, attn_mask=future, scalar_value=width**-0.5, input_layout="BSND"
    )


CANDIDATES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "rms_norm": ("mindspore.ops.rms_norm", rms_norm),
    "swiglu": ("mindspore.ops.swiglu", swiglu),
    "rope": ("mindspore.ops.rotary_position_embedding", rope),
    "attention": ("mindspore.ops.flash_attention_score", attention),
}
"""Name and function of the fused form by kernel of Ops; the first argument of the function is the Ops."""


@dataclass(frozen=True)
class Choice:
    """The result of trying a fused form."""

    kernel: str
    function: Callable[..., Tensor] | None
    """None: use the composition."""
    label: str
    """The name of the fused form, or why it is not used."""


def try_fused(ops: MindSporeOps, dtype: str) -> dict[str, Choice]:
    """Try every candidate on the device in a compute type."""
    return {kernel: _try(ops, kernel, name, candidate, dtype) for kernel, (name, candidate) in CANDIDATES.items()}


def with_fused(ops: OpsT, choices: Mapping[str, Choice]) -> OpsT:
    """The same operations with the fused forms that passed."""
    chosen = {kernel: choice.function for kernel, choice in choices.items() if choice.function}
    if not chosen:
        return ops
    kind: Any = type(f"Fused{type(ops).__name__}", (type(ops),), chosen)
    fused: OpsT = kind.__new__(kind)
    vars(fused).update(vars(ops))
    return fused


def _try(ops: MindSporeOps, kernel: str, name: str, candidate: Callable[..., Tensor], dtype: str) -> Choice:
    arguments, differentiated = _arguments(kernel, dtype)
    for options in ({"causal": True}, {"causal": False}) if kernel == "attention" else ({},):
        composition, fused = (partial(f, **options) for f in (getattr(ops, kernel), partial(candidate, ops)))
        expected = _value_and_gradients(ops, composition, arguments, differentiated)
        try:
            ops.to_numpy(fused(*arguments))  # a kernel that fails under differentiation leaves MindSpore in a bad state
            received = _value_and_gradients(ops, fused, arguments, differentiated)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
            return Choice(kernel, None, f"{name} fails on this device: {reason}")
        for x, y in zip(expected, received, strict=True):
            worst = float(np.abs(x - y).max() / np.abs(x).max())
            if not worst <= TOLERANCE[dtype]:
                return Choice(kernel, None, f"{name} is wrong on this device by {worst:.1e}")
    return Choice(kernel, candidate, name)


def _arguments(kernel: str, dtype: str) -> tuple[list[Any], int]:
    """Small inputs, and how many of the first of them a model differentiates with respect to."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Tensor:
        return Tensor(random.standard_normal(shape)).astype(DTYPES[dtype])

    batch, sequence, heads, groups, width = 2, 16, 4, 2, 64
    if kernel == "rms_norm":
        return [draw(8, width), draw(width), 1e-5], 2
    if kernel == "swiglu":
        return [draw(8, 2 * width)], 1
    if kernel == "rope":
        table = draw(sequence, width // 2)
        table = msops.cat((table, table), -1)
        return [draw(batch, sequence, heads, width), msops.cos(table), msops.sin(table)], 1
    return [draw(batch, sequence, n, width) for n in (heads, groups, groups)], 3


def _value_and_gradients(
    ops: MindSporeOps, function: Callable[..., Tensor], arguments: list[Any], differentiated: int
) -> list[np.ndarray]:
    """The value, and the gradients of its weighted sum with respect to the first arguments."""

    def weighted(*args: Any) -> Any:
        out = ops.accurate(function(*args))
        weight = np.random.default_rng(1).standard_normal(out.shape).astype(ops.dtype(out))
        return (out * Tensor(weight)).sum(), out

    (_, out), found = ms.value_and_grad(weighted, tuple(range(differentiated)), None, has_aux=True)(*arguments)
    gradients = found if isinstance(found, tuple) else (found,)
    return [ops.to_numpy(x) for x in (out, *gradients)]
