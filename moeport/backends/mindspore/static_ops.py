"""Operations for tracing: shapes do not depend on data, and few kernels are launched.

A trace silently ignores custom gradients, so whatever is fast here must also be fast when MindSpore differentiates it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore import ops as msops
from typing_extensions import override

from moeport.backends.mindspore.ops import INDEX, MindSporeOps, zeros
from moeport.core.ops import CAUSAL, AttentionOptions


class StaticOps(MindSporeOps):
    """MindSporeOps with a fixed number of rows per expert.

    Args:
        expert_rows: rows that each expert computes. The caller must ensure that none has more: excess rows are lost.
        differentiable: whether gradients will be needed; the loss then computes them in the forward pass.
    """

    def __init__(self, expert_rows: int, differentiable: bool = True):
        self.expert_rows = expert_rows
        self.differentiable = differentiable

    @override
    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """Does nothing if the type is right, since a trace keeps every cast."""
        return x if self.dtype(x) == dtype else super().cast(x, dtype)

    @override
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Without rows the result is a constant: MatMul would leave the gradient of the weight as its memory was."""
        if not x.size:
            return self.zeros((*x.shape[:-1], weight.shape[0]), self.dtype(x))
        flat = msops.reshape(x, (-1, x.shape[-1])) if x.ndim != 2 else x
        out = msops.MatMul(transpose_b=True)(flat, self.cast(weight, self.dtype(x)))
        return msops.reshape(out, (*x.shape[:-1], weight.shape[0])) if x.ndim != 2 else out

    @override
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Sums and copies along a dimension are products with ones, forward and so also backward."""
        width = x.shape[-1]
        flat: Tensor = self.accurate(msops.reshape(x, (-1, width)))
        kind = flat.dtype
        column, row, ones = (_ones(shape, kind) for shape in ((width, 1), (1, width), (flat.shape[0], 1)))
        mean = msops.matmul(flat * flat, column) * Tensor(1.0 / width, kind)
        scale = msops.matmul(msops.rsqrt(mean + Tensor(eps, kind)), row)
        weights = msops.matmul(ones, msops.reshape(self.cast(weight, self.dtype(flat)), (1, width)))
        return self.cast(msops.reshape(flat * scale * weights, x.shape), self.dtype(x))

    @override
    def rope(self, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
        """The halves are swapped by a product with a signed permutation, which is exact."""
        x: Tensor = self.accurate(x_BSHA)
        sequence, width = x.shape[1], x.shape[3]
        swap = np.zeros((width, width), np.float32)
        half = np.arange(width // 2)
        swap[half + width // 2, half], swap[half, half + width // 2] = -1, 1
        kind = self.dtype(x)
        cos, sin = (msops.reshape(self.cast(table, kind), (-1, sequence, 1, width)) for table in (cos_SA, sin_SA))
        swapped = msops.matmul(msops.reshape(x, (-1, width)), Tensor(swap).astype(x.dtype))
        return self.cast(x * cos + msops.reshape(swapped, x.shape) * sin, self.dtype(x_BSHA))

    @override
    def attention(
        self,
        q_BSHA: Tensor,
        k_BSGA: Tensor,
        v_BSGW: Tensor,
        options: AttentionOptions = CAUSAL,
    ) -> Tensor:
        """Batched products with an additive mask."""
        batch, sequence, heads, width = q_BSHA.shape
        groups, value_width = v_BSGW.shape[2:]
        share = heads // groups
        factor = Tensor(width**-0.5 if options.scale is None else options.scale, q_BSHA.dtype)
        q = msops.reshape(q_BSHA * factor, (batch, sequence, groups, share, width))
        q = msops.reshape(msops.transpose(q, (0, 2, 3, 1, 4)), (batch * groups, share * sequence, width))
        k, v = (
            msops.reshape(msops.transpose(x, (0, 2, 1, 3)), (batch * groups, sequence, x.shape[3]))
            for x in (k_BSGA, v_BSGW)
        )
        scores: Tensor = self.accurate(msops.BatchMatMul(transpose_b=True)(q, k))
        if options.causal:
            future = np.where(np.tri(sequence, dtype=bool), np.float32(0), -np.float32(np.inf))
            scores = scores + Tensor(np.tile(future, (share, 1))).astype(scores.dtype)
        if options.document_BS is not None:
            scores = msops.reshape(scores, (batch, heads, sequence, sequence))
            scores = self._within_documents(scores, options.document_BS)
            scores = msops.reshape(scores, (batch * groups, share * sequence, sequence))
        out = msops.BatchMatMul()(self.cast(msops.softmax(scores, -1), self.dtype(v)), v)
        out = msops.reshape(out, (batch, heads, sequence, value_width))
        return msops.transpose(out, (0, 2, 1, 3))

    def _within_documents(self, scores_BHSS: Tensor, document_BS: Tensor) -> Tensor:
        """The scores of pairs in one document; those of others become minus infinity."""
        hidden = msops.expand_dims(document_BS, 2) != msops.expand_dims(document_BS, 1)
        return msops.masked_fill(scores_BHSS, msops.expand_dims(hidden, 1), Tensor(-np.inf, scores_BHSS.dtype))

    @override
    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = msops.split(gate_up, gate_up.shape[-1] // 2, -1)
        return msops.silu(gate) * up

    @override
    def grouped_mlp(self, x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str) -> Tensor:
        """Each expert's rows are padded to `expert_rows`, then one batched product covers all experts."""
        rows, width = x_RD.shape
        if not rows:
            return x_RD
        zero = zeros((1, width), x_RD.dtype)
        experts, capacity = w_in.shape[0], min(self.expert_rows, rows)
        end_E = msops.cumsum(counts_E, 0)
        start_E = end_E - counts_E
        slot_C = Tensor(np.arange(capacity, dtype=np.int32))
        row_EC = msops.expand_dims(start_E, 1) + slot_C
        row_EC = msops.where(slot_C < msops.expand_dims(counts_E, 1), row_EC, Tensor(rows, INDEX))
        padded = msops.cat((x_RD, zero))
        x_ECD = msops.gather(padded, row_EC, 0)
        hidden = msops.BatchMatMul(transpose_b=True)(x_ECD, w_in)
        hidden = self.swiglu(hidden) if activation == "swiglu" else self.gelu(hidden)
        y_ECD = msops.BatchMatMul(transpose_b=True)(hidden, w_out_EDF)
        y = msops.cat((msops.reshape(y_ECD, (experts * capacity, width)), zero))
        row_R = Tensor(np.arange(rows, dtype=np.int32))
        expert_R = (msops.expand_dims(row_R, 1) >= end_E).astype(INDEX).sum(1).astype(INDEX)
        served_R = row_R < end_E[experts - 1]
        start_R = msops.gather(start_E, msops.minimum(expert_R, Tensor(experts - 1, INDEX)), 0)
        unserved = Tensor(experts * capacity, INDEX)
        slot_R = msops.minimum(expert_R * Tensor(capacity, INDEX) + row_R - start_R, unserved)
        return msops.gather(y, msops.where(served_R, slot_R, unserved), 0)

    @override
    def linear_cross_entropy(
        self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll_T1, z = self._linear_losses(x_TD, weight_VD, target_T, z_weight)
        return loss, msops.mean(nll_T1), z

    @override
    def linear_cross_entropy_by_token(
        self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll_T1, z = self._linear_losses(x_TD, weight_VD, target_T, z_weight)
        return loss, msops.reshape(nll_T1, (-1,)), z

    def _linear_losses(
        self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the cross entropy of each token (T, 1), and the z-loss.

        The gradients G of x and W are computed here, and the loss gets the term <G, x> + <G, W> minus its
        own value, which is exactly 0 and has the gradients G. MindSpore would need three more passes over T x V, one
        of them slow.
        """
        kind, tokens = self.dtype(x_TD), x_TD.shape[0]
        weight_VD = self.cast(weight_VD, kind)
        x, weight = msops.stop_gradient(x_TD), msops.stop_gradient(weight_VD)
        logits = self.accurate(msops.MatMul(transpose_b=True)(x, weight))
        top, top_id = msops.max(logits, -1, keepdims=True)
        probs = msops.softmax(logits, -1)
        log_partition = top - msops.log(msops.gather_elements(probs, 1, top_id))
        picked = msops.gather_elements(logits, 1, msops.reshape(target_T, (-1, 1)))
        nll_T1, z = log_partition - picked, msops.mean(log_partition * log_partition)
        loss = msops.mean(nll_T1) + z * self.constant_like(z_weight, z)
        if not self.differentiable:
            return loss, nll_T1, z
        share = self.constant(1.0 / tokens, kind)
        slope = self.constant_like(1.0 / tokens, z) + log_partition * self.constant_like(2.0 * z_weight / tokens, z)
        slope, probs = self.cast(slope, kind), self.cast(probs, kind)
        grad_x = msops.matmul(probs, weight) * slope - msops.gather(weight, target_T, 0) * share
        grad_weight = msops.MatMul(transpose_a=True)(probs, x * slope) - msops.unsorted_segment_sum(
            x * share, target_T, weight.shape[0]
        )
        carrier = self.cast(_dot(grad_x, x_TD) + _dot(grad_weight, weight_VD), self.dtype(loss))
        return msops.stop_gradient(loss) + (carrier - msops.stop_gradient(carrier)), nll_T1, z


def _ones(shape: tuple[int, int], dtype: Any) -> Tensor:
    return Tensor(np.ones(shape, np.float32)).astype(dtype)


def _dot(constant: Tensor, x: Tensor) -> Tensor:
    """Sum of products, as a matrix product: the CPU target's reductions are slow."""
    flat = msops.reshape(msops.stop_gradient(constant), (1, -1))
    return msops.reshape(msops.matmul(flat, msops.reshape(x, (-1, 1))), ())
