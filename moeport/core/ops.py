"""Ops: what a backend must supply, and the kernels it may replace.

Neutral code receives an `Ops` object explicitly and uses nothing else of a framework, apart from the arithmetic
and comparison operators, slicing and `.shape` that every array type has. Its rules:

* scalars enter arithmetic through `constant` or `constant_like`: MindSpore rounds a bare Python float to float32;
* no in-place operation, no hidden state, no data-dependent shape outside `grouped_mlp`;
* indices come from `argsort`, `topk`, `arange`, so that each backend keeps its own index type.

*Primitives* are abstract. *Kernels* (the second half) have a default composition of primitives; a backend replaces one
by a fused form if it has one, and the conformance suite holds every replacement against the default.

Shape suffixes: T tokens, D model width, F expert hidden width, E experts, K experts per token, N = T * K assignments,
R rows sent to experts, V vocabulary, B batch, S sequence, H query heads, G key/value heads, A head width, W width of
values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.core.array import Array
from moeport.core.dispatch_plan import DispatchPlan

FLOAT_DTYPES = ("bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What attention takes besides queries, keys and values."""

    causal: bool = True
    """Whether no position sees a later one."""
    scale: float | None = None
    """Multiplies the scores; None: 1 / sqrt(A)."""
    document_BS: Any = None
    """Where each position's document begins, an index of the sequence: no position sees another document; None: each
    sequence is one document."""


CAUSAL = AttentionOptions()
"""Within whole sequences, of earlier positions, with the usual scale."""


class Ops(ABC):
    """Array operations of one backend on one device. Stateless."""

    def unrecorded(self) -> Ops:
        """The same operations without recording, for values that no result depends on; `self` unless they record."""
        return self

    def part(self, name: str) -> AbstractContextManager[None]:
        """Says that what the block computes belongs to a part of the step, for a profile; otherwise it does nothing.

        Args:
            name: one of `moeport.core.parts.PARTS`.
        """
        return nullcontext()

    def fuses(self, kernel: str, dtype: str) -> bool:
        """Whether a kernel is something else than its default composition in a type."""
        return getattr(type(self), kernel) is not getattr(Ops, kernel)

    # ------------------------------------------------------------------ creation and conversion

    @abstractmethod
    def from_numpy(self, array: np.ndarray) -> Array:
        """Copy a numpy array to the device; float types are kept, integers become the index type."""

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Copy to the host; bfloat16 becomes float32. Waits for the device."""

    def fetch(self, xs: Sequence[Array]) -> list[np.ndarray]:
        """`to_numpy` of several arrays at once."""
        return [self.to_numpy(x) for x in xs]

    def on_host(self, x: Array) -> np.ndarray | None:
        """A read-only view of `x` without a copy; None if numpy cannot read its memory or type."""
        return None

    @abstractmethod
    def constant(self, value: float, dtype: str) -> Array:
        """A scalar that takes part in arithmetic with arrays of `dtype` at that type's precision."""

    def constant_like(self, value: float, x: Array) -> Array:
        """`constant` of the type of `x`."""
        return self.constant(value, self.dtype(x))

    @abstractmethod
    def zeros(self, shape: Sequence[int], dtype: str) -> Array:
        """An array of zeros."""

    @abstractmethod
    def index(self, value: int) -> Array:
        """A scalar of the index type, for `where`."""

    @abstractmethod
    def arange(self, n: int) -> Array:
        """Indices 0 .. n-1 of the index type."""

    # ------------------------------------------------------------------ types

    @abstractmethod
    def dtype(self, x: Array) -> str:
        """Name of the element type: bfloat16, float32, float64, bool, or the backend's index type."""

    @abstractmethod
    def cast(self, x: Array, dtype: str) -> Array:
        """Convert to one of FLOAT_DTYPES; differentiable between float types."""

    def accurate(self, x: Array) -> Array:
        """`x` in float32 if its type is narrower, otherwise unchanged."""
        return self.cast(x, "float32") if self.dtype(x) == "bfloat16" else x

    @abstractmethod
    def stop_gradient(self, x: Array) -> Array:
        """`x`, treated as a constant by differentiation."""

    # ------------------------------------------------------------------ shapes

    @abstractmethod
    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """Same elements in row-major order, new shape."""

    @abstractmethod
    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """Permute dimensions."""

    @abstractmethod
    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        """Join along a dimension."""

    @abstractmethod
    def split(self, x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        """Split into consecutive pieces; a size may be 0."""

    # ------------------------------------------------------------------ elementwise

    @abstractmethod
    def exp(self, x: Array) -> Array:
        """e^x."""

    @abstractmethod
    def log(self, x: Array) -> Array:
        """Natural logarithm."""

    @abstractmethod
    def rsqrt(self, x: Array) -> Array:
        """1 / sqrt(x)."""

    @abstractmethod
    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x)."""

    @abstractmethod
    def erf(self, x: Array) -> Array:
        """The error function."""

    @abstractmethod
    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where the condition holds, otherwise y; broadcasts."""

    # ------------------------------------------------------------------ reductions

    @abstractmethod
    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        """Sum over one dimension, or over all."""

    @abstractmethod
    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        """Mean over one dimension, or over all."""

    @abstractmethod
    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        """Largest value along a dimension."""

    @abstractmethod
    def cumsum(self, x: Array, axis: int) -> Array:
        """Running sum of indices along a dimension."""

    @abstractmethod
    def softmax(self, x: Array) -> Array:
        """Softmax over the last dimension."""

    @abstractmethod
    def logsumexp(self, x: Array) -> Array:
        """log(sum(exp(x))) over the last dimension, which is dropped."""

    # ------------------------------------------------------------------ products

    @abstractmethod
    def matmul(self, x: Array, y: Array) -> Array:
        """Matrix product over the last two dimensions; leading ones broadcast."""

    # ------------------------------------------------------------------ indices

    @abstractmethod
    def take_rows(self, x: Array, ids: Array) -> Array:
        """x[ids] along the first dimension; ids of any shape."""

    @abstractmethod
    def take_last(self, x: Array, ids: Array) -> Array:
        """Pick along the last dimension: out[..., j] = x[..., ids[..., j]]."""

    @abstractmethod
    def segment_sum(self, values: Array, ids: Array, n: int) -> Array:
        """out[i] = sum of the rows of `values` whose id is i, for i in 0 .. n-1; `ids` has one dimension."""

    @abstractmethod
    def one_hot(self, ids: Array, n: int, dtype: str) -> Array:
        """1 at each id in a new last dimension of size n."""

    @abstractmethod
    def bincount(self, ids: Array, n: int) -> Array:
        """How often each of 0 .. n-1 occurs in the one-dimensional `ids`; of the index type."""

    @abstractmethod
    def argsort(self, x: Array, descending: bool = False) -> Array:
        """Indices that sort a one-dimensional array; ties go to the lower index, ascending or descending."""

    @abstractmethod
    def topk_ids(self, x: Array, k: int) -> Array:
        """Indices of the k largest along the last dimension, largest first; ties go to the lower index.

        This is the pinned tie rule; frameworks' own top-k functions leave the order of ties unspecified.
        """

    # ------------------------------------------------------------------ kernels

    def linear(self, x: Array, weight: Array) -> Array:
        """x @ weight^T in the type of x. Args: x (..., I), weight (O, I) of any float type. Returns (..., O)."""
        return self.matmul(x, self.transpose(self.cast(weight, self.dtype(x)), (1, 0)))

    def linear_accurate(self, x: Array, weight: Array) -> Array:
        """x @ weight^T in float32 or wider, from operands in the type of x. Args and shapes as in `linear`.

        A backend may keep the sums as they were added; by default they are rounded to the type of x.
        """
        return self.accurate(self.linear(x, weight))

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

        Computed in float32 or wider, returned in the type of x.
        """
        y = self.accurate(x)
        scale = self.rsqrt(self.mean(y * y, axis=-1, keepdims=True) + self.constant_like(eps, y))
        return self.cast(y * scale * self.cast(weight, self.dtype(y)), self.dtype(x))

    def rope(self, x_BSHA: Array, cos_SA: Array, sin_SA: Array) -> Array:
        """Rotary embedding, rotate-half pairing (Su et al. 2021; pairs (i, i + A/2) as in GPT-NeoX).

        Args: x (B, S, H, A); cos and sin (S, A), or (B, S, A) where positions differ between sequences; their two
        halves are equal. Returns the shape and type of x.
        """
        sequence, width = x_BSHA.shape[1], x_BSHA.shape[3]
        x = self.accurate(x_BSHA)
        cos = self.reshape(self.cast(cos_SA, self.dtype(x)), (-1, sequence, 1, width))
        sin = self.reshape(self.cast(sin_SA, self.dtype(x)), (-1, sequence, 1, width))
        low, high = self.split(x, (width // 2, width // 2), axis=3)
        return self.cast(x * cos + self.concat((-high, low), axis=3) * sin, self.dtype(x_BSHA))

    def attention(
        self,
        q_BSHA: Array,
        k_BSGA: Array,
        v_BSGW: Array,
        options: AttentionOptions = CAUSAL,
    ) -> Array:
        """Scaled-dot-product attention with grouped heads: query head h reads key/value head h // (H / G).

        Args:
            q_BSHA: queries.
            k_BSGA: keys.
            v_BSGW: values, whose width W need not be that of queries and keys.
            options: which pairs are seen, and the scale of their scores.

        Returns: (B, S, H, W) in the type of q.
        """
        batch, sequence, heads, width = q_BSHA.shape
        groups, value_width = v_BSGW.shape[2:]
        q = self.transpose(self.reshape(q_BSHA, (batch, sequence, groups, heads // groups, width)), (0, 2, 3, 1, 4))
        k = self.reshape(self.transpose(k_BSGA, (0, 2, 3, 1)), (batch, groups, 1, width, sequence))
        v = self.reshape(self.transpose(v_BSGW, (0, 2, 1, 3)), (batch, groups, 1, sequence, value_width))
        scores = self.accurate(self.matmul(q, k))
        scores = scores * self.constant_like(width**-0.5 if options.scale is None else options.scale, scores)
        if options.causal:
            position = self.arange(sequence)
            future = self.reshape(position, (1, sequence)) > self.reshape(position, (sequence, 1))
            scores = self.where(future, self.constant_like(-np.inf, scores), scores)
        if options.document_BS is not None:
            own, others = ((batch, 1, 1, *shape) for shape in ((sequence, 1), (1, sequence)))
            same = self.reshape(options.document_BS, own) == self.reshape(options.document_BS, others)
            scores = self.where(same, scores, self.constant_like(-np.inf, scores))
        out = self.matmul(self.cast(self.softmax(scores), self.dtype(v)), v)
        return self.reshape(self.transpose(out, (0, 3, 1, 2, 4)), (batch, sequence, heads, value_width))

    def cached_attention(
        self,
        q_BQHA: Array,
        k_BQGA: Array,
        v_BQGW: Array,
        keys_BCGA: Array,
        values_BCGW: Array,
        position_BQ: Array,
        scale: float | None = None,
    ) -> tuple[Array, Array, Array]:
        """Attention of new positions to a cache of earlier ones, to which their own keys and values are added first.

        For generation: nothing is differentiated, and the caches passed in are no longer valid afterwards, since a
        backend may write into them.

        Args:
            q_BQHA: queries of Q new positions of each text, at least one; heads are grouped as in `attention`.
            k_BQGA: their keys.
            v_BQGW: their values, of any width W.
            keys_BCGA: keys by position; C is the room, and what lies beyond a text's last position is never read.
            values_BCGW: values by position.
            position_BQ: position of each new token, below C, of the index type; all different within a text.
            scale: multiplies the scores; None: 1 / sqrt(A).

        Returns: (attention to all positions up to each query's own (B, Q, H, W) in the type of q, keys, values).
        """
        (batch, new, heads, width), (room, groups, value_width) = q_BQHA.shape, values_BCGW.shape[1:]
        hit_BQC = self.one_hot(position_BQ, room, self.dtype(keys_BCGA))
        taken_BC11 = self.reshape(self.max(hit_BQC, axis=1), (batch, room, 1, 1))
        is_taken = taken_BC11 > self.constant_like(0.5, taken_BC11)
        hit_BCQ = self.transpose(hit_BQC, (0, 2, 1))

        def added(cache: Array, x: Array) -> Array:
            placed = self.matmul(hit_BCQ, self.reshape(x, (batch, new, -1)))
            return self.where(is_taken, self.reshape(placed, cache.shape), cache)

        keys_BCGA, values_BCGW = added(keys_BCGA, k_BQGA), added(values_BCGW, v_BQGW)
        q = self.transpose(self.reshape(q_BQHA, (batch, new, groups, heads // groups, width)), (0, 2, 3, 1, 4))
        k = self.reshape(self.transpose(keys_BCGA, (0, 2, 3, 1)), (batch, groups, 1, width, room))
        v = self.reshape(self.transpose(values_BCGW, (0, 2, 1, 3)), (batch, groups, 1, room, value_width))
        scores = self.accurate(self.matmul(q, k))
        scores = scores * self.constant_like(width**-0.5 if scale is None else scale, scores)
        later = self.arange(room) > self.reshape(position_BQ, (batch, 1, 1, new, 1))
        scores = self.where(later, self.constant_like(-np.inf, scores), scores)
        out = self.matmul(self.cast(self.softmax(scores), self.dtype(v)), v)
        out = self.reshape(self.transpose(out, (0, 3, 1, 2, 4)), (batch, new, heads, value_width))
        return out, keys_BCGA, values_BCGW

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up (Shazeer 2020). Args: gate_up (..., 2F), gate first. Returns (..., F)."""
        width = gate_up.shape[-1] // 2
        gate, up = self.split(gate_up, (width, width), axis=-1)
        return gate * self.sigmoid(gate) * up

    def gelu(self, x: Array) -> Array:
        """x * Phi(x), the exact form (Hendrycks and Gimpel 2016)."""
        half, scale = self.constant_like(0.5, x), self.constant_like(2**-0.5, x)
        return x * half * (self.constant_like(1.0, x) + self.erf(x * scale))

    def mlp(self, x: Array, w_in: Array, w_out: Array, activation: str) -> Array:
        """One feed-forward block. Args: x (..., D); w_in (2F, D) for swiglu, (F, D) for gelu; w_out (D, F)."""
        hidden = self.linear(x, w_in)
        return self.linear(self.swiglu(hidden) if activation == "swiglu" else self.gelu(hidden), w_out)

    def grouped_mlp(self, x_RD: Array, w_in: Array, w_out_EDF: Array, counts_E: Array, activation: str) -> Array:
        """One feed-forward block per expert, over rows sorted by expert.

        Args:
            x_RD: rows of expert 0, then of expert 1, ...; rows after the last counted one belong to no expert.
            w_in: (E, 2F, D) for swiglu, gate first; (E, F, D) for gelu.
            w_out_EDF: output weights.
            counts_E: rows per expert; the sum may be less than R.
            activation: swiglu or gelu.

        Returns: (R, D) in the type of x; rows that belong to no expert are 0.
        """
        counts = [int(count) for count in self.to_numpy(counts_E)]
        rest = x_RD.shape[0] - sum(counts)
        *rows, _ = self.split(x_RD, [*counts, rest], axis=0)
        outputs = [
            self.mlp(x_nD, w_in[expert], w_out_EDF[expert], activation)
            for expert, x_nD in enumerate(rows)
            if counts[expert]
        ]
        return self.concat([*outputs, self.zeros((rest, x_RD.shape[1]), self.dtype(x_RD))], axis=0)

    def inverse(self, order_N: Array) -> Array:
        """The inverse of a permutation of 0 .. N-1: `inverse(order_N)[order_N[n]] = n`."""
        return self.argsort(order_N)

    def sort_by_group(self, group_N: Array, groups: int) -> tuple[Array, Array, Array]:
        """Sort entries by group; within a group they keep their order.

        Args:
            group_N: group of each entry, 0 .. groups-1, of the index type.
            groups: G.

        Returns: (entry of each place (N,), place of each entry (N,), entries per group (G,)), of the index type.
        """
        order_N = self.argsort(group_N)
        return order_N, self.inverse(order_N), self.bincount(group_N, groups)

    def permute(self, x_TD: Array, plan: DispatchPlan) -> Array:
        """Copy each token to the rows of its assignments, sorted by expert. Returns (R, D)."""
        return self.take_rows(x_TD, plan.token_R)

    def unpermute(self, y_RD: Array, weight_N: Array, plan: DispatchPlan) -> Array:
        """Sum the rows of each token, weighted; the inverse of `permute`. Returns (T, D) in the type of y."""
        weight_R = self.cast(self.take_rows(weight_N, plan.order_R), self.dtype(y_RD))
        return self.segment_sum(y_RD * self.reshape(weight_R, (-1, 1)), plan.token_R, plan.num_tokens)

    def routed_mlp(
        self, x_TD: Array, weight_N: Array, plan: DispatchPlan, w_in: Array, w_out_EDF: Array, activation: str
    ) -> Array:
        """Each token's expert outputs, weighted and summed: `permute`, `grouped_mlp` and `unpermute` in one.

        Args:
            x_TD: tokens.
            weight_N: gate of each assignment; 0 if it is not served.
            plan: where each assignment goes.
            w_in: as in `grouped_mlp`.
            w_out_EDF: output weights.
            activation: swiglu or gelu.

        Returns: (T, D) in the type of x; 0 for a token without a served assignment.
        """
        y_RD = self.grouped_mlp(self.permute(x_TD, plan), w_in, w_out_EDF, plan.counts_E, activation)
        return self.unpermute(y_RD, weight_N, plan)

    def cross_entropy(self, logits_TV: Array, target_T: Array) -> tuple[Array, Array]:
        """Negative log-likelihood in nats and log-partition per token, in float32 or wider.

        Returns: (nll_T, logsumexp_T).
        """
        logits = self.accurate(logits_TV)
        log_partition_T = self.logsumexp(logits)
        picked_T = self.reshape(self.take_last(logits, self.reshape(target_T, (-1, 1))), (-1,))
        return log_partition_T - picked_T, log_partition_T

    def linear_cross_entropy(
        self, x_TD: Array, weight_VD: Array, target_T: Array, z_weight: float
    ) -> tuple[Array, Array, Array]:
        """Output projection and loss in one, so that a backend need not keep T x V logits.

        Args:
            x_TD: final hidden states.
            weight_VD: output projection.
            target_T: ids of the target tokens.
            z_weight: weight of the output z-loss, mean(logsumexp^2).

        Returns: (cross entropy + z_weight * z-loss, cross entropy, z-loss), scalar means over tokens in float32 or
        wider; the gradient flows through the first only.
        """
        nll_T, log_partition_T = self.cross_entropy(self.linear(x_TD, weight_VD), target_T)
        cross_entropy, z = self.mean(nll_T), self.mean(log_partition_T * log_partition_T)
        loss = cross_entropy + z * self.constant_like(z_weight, z)
        return loss, self.stop_gradient(cross_entropy), self.stop_gradient(z)

    def linear_cross_entropy_by_token(
        self, x_TD: Array, weight_VD: Array, target_T: Array, z_weight: float
    ) -> tuple[Array, Array, Array]:
        """`linear_cross_entropy` with the cross entropy of each token, (T,), in place of its mean."""
        nll_T, log_partition_T = self.cross_entropy(self.linear(x_TD, weight_VD), target_T)
        z = self.mean(log_partition_T * log_partition_T)
        loss = self.mean(nll_T) + z * self.constant_like(z_weight, z)
        return loss, self.stop_gradient(nll_T), self.stop_gradient(z)


PRIMITIVES = tuple(sorted(Ops.__abstractmethods__))
"""Names that a backend must define."""

KERNELS = (
    "linear",
    "linear_accurate",
    "rms_norm",
    "rope",
    "attention",
    "cached_attention",
    "swiglu",
    "gelu",
    "mlp",
    "grouped_mlp",
    "inverse",
    "sort_by_group",
    "permute",
    "unpermute",
    "routed_mlp",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_by_token",
)
"""Names that a backend may replace by a fused form."""
