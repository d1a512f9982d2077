"""Ops in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from moeport.backends.torch import kernels, sorting
from moeport.backends.torch.documents import masked_attention
from moeport.backends.torch.private import inside_torch_func
from moeport.backends.torch.wide import WideLinear, has_wide_products
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import CAUSAL, AttentionOptions, Ops

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def name_of(dtype: torch.dtype) -> str:
    """The name of an element type."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


class TorchOps(Ops):
    """Primitives and fused kernels on one device."""

    def __init__(self, device: torch.device):
        self.device = device

    @override
    def from_numpy(self, array: np.ndarray) -> Tensor:
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
        return torch.tensor(array, device=self.device)

    @override
    def to_numpy(self, x: Tensor) -> np.ndarray:
        return self.accurate(x.detach()).cpu().numpy().copy()

    @override
    def fetch(self, xs: Sequence[Tensor]) -> list[np.ndarray]:
        """In one copy per element type."""
        found: dict[int, np.ndarray] = {}
        for dtype in {x.dtype for x in xs}:
            same = [index for index, x in enumerate(xs) if x.dtype == dtype]
            flat = self.to_numpy(torch.cat([xs[index].detach().reshape(-1) for index in same]))
            ends = np.cumsum([xs[index].numel() for index in same])
            parts = zip(same, np.split(flat, ends[:-1]), strict=True)
            found |= {index: part.reshape(xs[index].shape) for index, part in parts}
        return [found[index] for index in range(len(xs))]

    @override
    def on_host(self, x: Tensor) -> np.ndarray | None:
        return x.detach().numpy() if x.is_cpu and x.dtype is not torch.bfloat16 else None

    def constant(self, value: float, dtype: str) -> Any:
        """A Python float: PyTorch applies it at the precision of the tensor it meets."""
        return float(value)

    @override
    def constant_like(self, value: float, x: Tensor) -> Any:
        return float(value)

    @override
    def zeros(self, shape: Sequence[int], dtype: str) -> Tensor:
        return torch.zeros(tuple(shape), dtype=DTYPES[dtype], device=self.device)

    def index(self, value: int) -> Any:
        """A Python int."""
        return value

    @override
    def arange(self, n: int) -> Tensor:
        return torch.arange(n, device=self.device)

    @override
    def dtype(self, x: Tensor) -> str:
        return name_of(x.dtype)

    @override
    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(DTYPES[dtype])

    @override
    def accurate(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

    @override
    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()

    @override
    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    @override
    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(tuple(axes))

    @override
    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(xs), axis)

    @override
    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
        return list(x.split(list(sizes), axis))

    @override
    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    @override
    def log(self, x: Tensor) -> Tensor:
        return x.log()

    @override
    def rsqrt(self, x: Tensor) -> Tensor:
        return x.rsqrt()

    @override
    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    @override
    def erf(self, x: Tensor) -> Tensor:
        return x.erf()

    @override
    def where(self, condition: Tensor, x: Any, y: Any) -> Tensor:
        return torch.where(condition, x, y)

    @override
    def sum(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return x.sum() if axis is None else x.sum(axis, keepdim=keepdims)

    @override
    def mean(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return x.mean() if axis is None else x.mean(axis, keepdim=keepdims)

    @override
    def max(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        return x.amax(axis, keepdim=keepdims)

    @override
    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        return x.cumsum(axis)

    @override
    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    @override
    def logsumexp(self, x: Tensor) -> Tensor:
        return x.logsumexp(-1)

    @override
    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    @override
    def take_rows(self, x: Tensor, ids: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.embedding(ids, x)
        return x.index_select(0, ids.reshape(-1)).reshape(*ids.shape, *x.shape[1:])

    @override
    def take_last(self, x: Tensor, ids: Tensor) -> Tensor:
        return x.gather(-1, ids)

    @override
    def segment_sum(self, values: Tensor, ids: Tensor, n: int) -> Tensor:
        return values.new_zeros((n, *values.shape[1:])).index_add(0, ids, values)

    @override
    def one_hot(self, ids: Tensor, n: int, dtype: str) -> Tensor:
        return F.one_hot(ids, n).to(DTYPES[dtype])

    @override
    def bincount(self, ids: Tensor, n: int) -> Tensor:
        """Compares ids, or sorts them: torch.bincount is not deterministic on CUDA and forces a wait, on an NPU two. No
        graph of torch.compile can hold it.
        """
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.bincount(ids, minlength=n)
        if ids.device.type in sorting.KEYED and n > sorting.MOST_COMPARED:
            return sorting.counts(sorting.sorted_keys(ids, n)[0], n)
        return (ids.unsqueeze(0) == torch.arange(n, device=ids.device).unsqueeze(1)).sum(1)

    @override
    def argsort(self, x: Tensor, descending: bool = False) -> Tensor:
        return x.argsort(stable=True, descending=descending)

    @override
    def topk_ids(self, x: Tensor, k: int) -> Tensor:
        """See `sorting.best_ids`."""
        return sorting.best_ids(x.detach(), k)

    # ------------------------------------------------------------------ kernels

    @override
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    @override
    def linear_accurate(self, x: Tensor, weight: Tensor) -> Tensor:
        if not has_wide_products(x) or inside_torch_func():
            return super().linear_accurate(x, weight)
        return WideLinear.apply(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])

    @override
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.device.type == "cpu":
            weight = weight.to(self.accurate(x[:0]).dtype)
            if not torch.is_grad_enabled():
                return kernels.RMSNorm.compute(x, weight, eps)[0]
            return kernels.RMSNorm.apply(x, weight, eps)
        y = self.accurate(x)
        return F.rms_norm(y, (x.shape[-1],), weight.to(y.dtype), eps).to(x.dtype)

    @override
    def rope(self, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
        x, half = self.accurate(x_BSHA), x_BSHA.shape[-1] // 2
        signed = torch.cat((-sin_SA[..., :half], sin_SA[..., half:]), -1)
        return torch.addcmul(x * cos_SA.unsqueeze(-2), x.roll(half, -1), signed.unsqueeze(-2)).to(x_BSHA.dtype)

    @override
    def attention(
        self,
        q_BSHA: Tensor,
        k_BSGA: Tensor,
        v_BSGW: Tensor,
        options: AttentionOptions = CAUSAL,
    ) -> Tensor:
        if options.document_BS is not None:
            return masked_attention(q_BSHA, k_BSGA, v_BSGW, options)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHA, k_BSGA, v_BSGW))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=options.causal, scale=options.scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    @override
    def cached_attention(
        self,
        q_BQHA: Tensor,
        k_BQGA: Tensor,
        v_BQGW: Tensor,
        keys_BCGA: Tensor,
        values_BCGW: Tensor,
        position_BQ: Tensor,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (batch, new, heads, width), (room, groups, _) = q_BQHA.shape, values_BCGW.shape[1:]
        row_R = position_BQ.flatten()
        if batch > 1:
            row_R = row_R + room * torch.arange(batch, device=self.device).repeat_interleave(new)
        keys_BCGA.flatten(0, 1).index_copy_(0, row_R, k_BQGA.flatten(0, 1))
        values_BCGW.flatten(0, 1).index_copy_(0, row_R, v_BQGW.flatten(0, 1))
        share = heads // groups  # query heads of a group count as queries, so that no key is repeated
        q = q_BQHA.reshape(batch, new, groups, share, width).transpose(1, 2).reshape(batch, groups, new * share, width)
        seen_BQC = torch.arange(room, device=self.device) <= position_BQ.unsqueeze(2)
        seen = seen_BQC.unsqueeze(2).expand(-1, -1, share, -1).reshape(batch, 1, new * share, room)
        keys, values = keys_BCGA.transpose(1, 2), values_BCGW.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys, values, seen, scale=scale)
        out = out.reshape(batch, groups, new, share, -1).transpose(1, 2).reshape(batch, new, heads, -1)
        return out, keys_BCGA, values_BCGW

    @override
    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @override
    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    @override
    def grouped_mlp(self, x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str) -> Tensor:
        w_in, w_out = w_in.to(x_RD.dtype), w_out_EDF.to(x_RD.dtype)
        aligned = x_RD.shape[1] % 8 == 0 and w_out.shape[2] % 8 == 0  # grouped_mm needs rows aligned to 16 bytes
        if aligned and self.uses_grouped_mm(x_RD):
            return self._grouped_mm_mlp(x_RD, w_in, w_out, counts_E, activation)
        if torch.compiler.is_compiling():
            return kernels.grouped_mlp_operation(x_RD, w_in, w_out, counts_E, activation)[0]
        counts = counts_E.tolist()
        if inside_torch_func():
            return kernels.grouped_mlp_of_operations(x_RD, w_in, w_out, counts, activation)
        return kernels.GroupedMLP.apply(x_RD, w_in, w_out, counts, activation)

    def uses_grouped_mm(self, x: Tensor) -> bool:
        """Whether torch's grouped GEMM supports this array: bfloat16 on CUDA of compute capability 9.0 or later."""
        return (
            x.device.type == "cuda"
            and x.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(x.device) >= (9, 0)
        )

    def _grouped_mm_mlp(self, x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str) -> Tensor:
        """The grouped GEMM leaves rows after the last group undefined, forward and backward: both sides are masked."""
        ends = counts_E.cumsum(0).to(torch.int32)
        served = (torch.arange(x_RD.shape[0], device=x_RD.device) < ends[-1]).unsqueeze(1)
        x_RD = torch.where(served, x_RD, 0)
        hidden = torch.where(served, F.grouped_mm(x_RD, w_in.transpose(1, 2), offs=ends), 0)
        hidden = self.swiglu(hidden) if activation == "swiglu" else self.gelu(hidden)
        return torch.where(served, F.grouped_mm(hidden, w_out.transpose(1, 2), offs=ends), 0)

    @override
    def inverse(self, order_N: Tensor) -> Tensor:
        return sorting.inverse(order_N) if order_N.device.type in sorting.KEYED else super().inverse(order_N)

    @override
    def sort_by_group(self, group_N: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        if group_N.device.type not in sorting.KEYED:
            return super().sort_by_group(group_N, groups)
        if group_N.is_cpu and type(group_N) is Tensor and not (torch.compiler.is_compiling() or inside_torch_func()):
            return sorting.by_group_on_host(group_N.numpy(), groups)
        return sorting.by_group(group_N, groups)

    @override
    def permute(self, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        if plan.choices_per_token is None or inside_torch_func():
            return super().permute(x_TD, plan)
        return kernels.Permute.apply(x_TD, plan.token_R, plan.position_N, plan.choices_per_token)

    @override
    def unpermute(self, y_RD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> Tensor:
        if plan.choices_per_token is None or inside_torch_func():
            return super().unpermute(y_RD, weight_N, plan)
        return kernels.Unpermute.apply(y_RD, weight_N, plan.order_R, plan.position_N, plan.choices_per_token)

    @override
    def linear_cross_entropy(
        self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, cross_entropy, z, _ = self._linear_losses(x_TD, weight_VD, target_T, z_weight)
        return loss, cross_entropy, z

    @override
    def linear_cross_entropy_by_token(
        self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, _, z, nll_T = self._linear_losses(x_TD, weight_VD, target_T, z_weight)
        return loss, nll_T, z

    def _linear_losses(
        self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `kernels.LinearCrossEntropy`."""
        if not torch.is_grad_enabled():  # the kernel itself cannot tell, and would compute gradients
            x_TD, weight_VD = x_TD.detach(), weight_VD.detach()
        rows = max(1, self.logits_block // weight_VD.shape[0])
        found: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.LinearCrossEntropy.apply(
            x_TD, weight_VD, target_T, z_weight, rows
        )
        return found

    @property
    def logits_block(self) -> int:
        """Number of logits that exist at a time: on the CPU 4 MiB in float32, which stay in cache; otherwise 1 GiB."""
        return 2**20 if self.device.type == "cpu" else 2**28
