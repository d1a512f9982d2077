"""Sides that must be bit-identical, since nothing that is recorded of them differs."""

from __future__ import annotations

from collections.abc import Sequence

from moeport.parity.recording import Recording
from moeport.parity.result import Difference, StepResult, TensorResult


def first_inequality(
    a: Recording,
    b: Recording,
    unequal: Sequence[Difference],
    tensors: Sequence[TensorResult],
    trajectory: Sequence[StepResult],
) -> list[str]:
    """A clause on the first tensor or step of twins that is not bit-identical; none for other sides.

    Twins have the same config, type, backend, device, versions, kernels and environment variables. A limit allows for
    rounding by other kernels, so between twins even an error within its limit has a cause that is not recorded.

    Args:
        a: the reference.
        b: the other.
        unequal: what differs between them besides tensors.
        tensors: all tensors in the order of execution.
        trajectory: all steps.
    """
    if unequal or not ("model" in a.config and "model" in b.config) or a.dtype != b.dtype:
        return []
    odd = [tensor for tensor in tensors if _differs(tensor)]
    steps = [step for step in trajectory if (step.loss_a, step.grad_norm_a) != (step.loss_b, step.grad_norm_b)]
    if odd:
        first = odd[0]
        what = f"{first.name} is the first of {len(odd)} tensors that are not bit-identical"
        size = f" (relative error {first.error:.1e}, limit {first.limit:.0e})" if first.limit else ""
    elif steps:
        what, size = f"step {steps[0].step} is the first whose loss or gradient norm is not bit-identical", ""
    else:
        return []
    cause = "although nothing else differs: one side computes otherwise, or is not deterministic"
    return [f"{what}{size}, {cause}"]


def _differs(tensor: TensorResult) -> bool:
    """Whether a tensor is known to differ."""
    return not tensor.metrics.equal if tensor.metrics else tensor.error > 0
