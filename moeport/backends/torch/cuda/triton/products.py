"""Grouped products in Triton, with the gather in their loads and the activation in their epilogues.

Not run on hardware: computed in Triton's interpreter, and compiled for compute capability 9.0 without a spill.

Every kernel is persistent: as many programs as there are multiprocessors share the tiles. A tile belongs to one expert,
and all have the same work, so a busy expert has more tiles and no program waits for it; the table of tiles is made on
the device from the rows per expert. Products along the rows, which give the gradients of weights, take the busiest
experts first, since their tiles differ in length. Nothing is atomic, and every sum has one order.

Limits of each kernel (R rows, E experts; FLOPs, and bytes in elements of the compute type if each array moves once;
SwiGLU, for which w_in has 2F rows):

    up                  4 R D F    T D + 2 E D F read, 3 R F written; unfused 2 R D + 2 R F more
    down                2 R D F    R F + E D F read, R D written
    down_backward       2 R D F    T D + E D F + 2 R F read, 3 R F written; unfused R D + R F, and R F again, more
    gradient of w_out   2 R D F    T D + R F read, E D F written; unfused R D more
    gradient of w_in    4 R D F    2 R F + T D read, 2 E D F written; unfused 2 R D more
    rows of x           4 R D F    2 R F + 2 E D F read, R D written
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.cuda.stages import grouped_mm
from moeport.backends.torch.cuda.triton import passes
from moeport.backends.torch.cuda.triton.activation import derivatives
from moeport.backends.torch.cuda.triton.tiles import columns_of, rows_of, table_of, tile_of


class Blocks(NamedTuple):
    """How large a tile is, and how many warps and stages of loads compute it."""

    M: int
    N: int
    K: int
    warps: int
    stages: int


UP = Blocks(128, 128, 64, 8, 3)
"""N: of the gate, and as many of what it multiplies."""
ROWS = Blocks(128, 256, 64, 8, 3)
DOWN_BACKWARD = Blocks(128, 128, 64, 8, 3)
WEIGHTS = Blocks(128, 256, 64, 8, 4)


@triton.jit
def product(
    a,
    source,
    live,
    w,
    columns,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of a times columns of w, in float32: sum_k a[source, k] w[column, k]."""
    k = tl.arange(0, BK)
    a_at = a + source[:, None] * K + k[None, :]
    w_at = w + columns[None, :] * STRIDE_N + k[:, None] * STRIDE_K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a_seen, w_seen = live[:, None], (columns < N)[None, :]
        if K % BK != 0:
            a_seen = a_seen & (k < K - start)[None, :]
            w_seen = w_seen & (k < K - start)[:, None]
        total = tl.dot(tl.load(a_at, mask=a_seen, other=0.0), tl.load(w_at, mask=w_seen, other=0.0), total)
        a_at += BK
        w_at += BK * STRIDE_K
    return total


@triton.jit
def two_products(
    a,
    source,
    live,
    w,
    columns,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of a times the same columns of the first N rows of w and of the next N, which load a once."""
    k = tl.arange(0, BK)
    a_at = a + source[:, None] * K + k[None, :]
    w_at = w + columns[None, :] * K + k[:, None]
    first, second = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a_seen, w_seen = live[:, None], (columns < N)[None, :]
        if K % BK != 0:
            a_seen = a_seen & (k < K - start)[None, :]
            w_seen = w_seen & (k < K - start)[:, None]
        rows = tl.load(a_at, mask=a_seen, other=0.0)
        first = tl.dot(rows, tl.load(w_at, mask=w_seen, other=0.0), first)
        second = tl.dot(rows, tl.load(w_at + N * K, mask=w_seen, other=0.0), second)
        a_at += BK
        w_at += BK
    return first, second


@triton.jit
def up_kernel(
    x,
    order,
    w,
    ends,
    table,
    total,
    hidden,
    activated,
    D: tl.constexpr,
    F: tl.constexpr,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * F if GATED else F
    tiles_n = tl.cdiv(F, BN)
    tiles_m = tl.load(total)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, row, n = tile_of(tile, table, tiles_m, tiles_n, GROUP)
        rows, source, live = rows_of(order, row, tl.load(ends + expert), CHOICES, BM)
        columns = columns_of(n, BN)
        w_e = w + expert.to(tl.int64) * WIDTH * D
        seen = live[:, None] & (columns < F)[None, :]
        to = hidden + rows[:, None] * WIDTH + columns[None, :]
        if GATED:
            first, second = two_products(x, source, live, w_e, columns, F, D, BM, BN, BK)
            second = second.to(hidden.dtype.element_ty)
            tl.store(to + F, second, mask=seen)
        else:
            first = product(x, source, live, w_e, columns, F, D, D, 1, BM, BN, BK)
            second = first
        first = first.to(hidden.dtype.element_ty)
        tl.store(to, first, mask=seen)
        value, _, _ = derivatives(first.to(tl.float32), second.to(tl.float32), GATED)
        tl.store(activated + rows[:, None] * F + columns[None, :], value.to(activated.dtype.element_ty), mask=seen)


@triton.jit
def rows_kernel(
    a,
    w,
    ends,
    table,
    total,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BN)
    tiles_m = tl.load(total)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, row, n = tile_of(tile, table, tiles_m, tiles_n, GROUP)
        rows, source, live = rows_of(ends, row, tl.load(ends + expert), 0, BM)
        columns = columns_of(n, BN)
        value = product(a, source, live, w + expert.to(tl.int64) * N * K, columns, N, K, STRIDE_N, STRIDE_K, BM, BN, BK)
        seen = live[:, None] & (columns < N)[None, :]
        tl.store(out + rows[:, None] * N + columns[None, :], value.to(out.dtype.element_ty), mask=seen)


@triton.jit
def activation_backward(
    d, weight, hidden, grad_hidden, scaled, rows, columns, live, F: tl.constexpr, GATED: tl.constexpr
):
    """Store what follows from the gradient d of some columns of the activation. Returns: the sum of their products."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    seen = live[:, None] & (columns < F)[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    first = tl.load(hidden + at, mask=seen, other=0.0).to(tl.float32)
    second = first
    if GATED:
        second = tl.load(hidden + at + F, mask=seen, other=0.0).to(tl.float32)
    value, by_first, by_second = derivatives(first, second, GATED)
    to = scaled + rows[:, None] * F + columns[None, :]
    tl.store(to, (value * weight[:, None]).to(scaled.dtype.element_ty), mask=seen)
    total = tl.sum(d * value, 1)
    d = d * weight[:, None]
    tl.store(grad_hidden + at, (d * by_first).to(grad_hidden.dtype.element_ty), mask=seen)
    if GATED:
        tl.store(grad_hidden + at + F, (d * by_second).to(grad_hidden.dtype.element_ty), mask=seen)
    return total


@triton.jit
def down_backward_kernel(
    grad,
    gate,
    order,
    w,
    hidden,
    ends,
    table,
    total,
    grad_hidden,
    scaled,
    partial,
    R,
    D: tl.constexpr,
    F: tl.constexpr,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_n = tl.cdiv(F, BN)
    tiles_m = tl.load(total)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, row, n = tile_of(tile, table, tiles_m, tiles_n, GROUP)
        rows, source, live = rows_of(order, row, tl.load(ends + expert), CHOICES, BM)
        columns = columns_of(n, BN)
        d = product(grad, source, live, w + expert.to(tl.int64) * D * F, columns, F, D, 1, F, BM, BN, BK)
        weight = tl.full((BM,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(gate + tl.load(order + rows, mask=live, other=0), mask=live, other=0.0).to(tl.float32)
        # Half of the columns at a time: the registers do not hold more.
        left, right = d.reshape((BM, 2, BN // 2)).permute((0, 2, 1)).split()
        half = columns_of(2 * n, BN // 2)
        sums = activation_backward(left, weight, hidden, grad_hidden, scaled, rows, half, live, F, GATED)
        half += BN // 2
        sums += activation_backward(right, weight, hidden, grad_hidden, scaled, rows, half, live, F, GATED)
        if WEIGHTED:
            tl.store(partial + n * R + rows, sums, mask=live)


@triton.jit
def weights_kernel(
    a,
    b,
    order,
    ends,
    ranked,
    out,
    E,
    M: tl.constexpr,
    N: tl.constexpr,
    A_CHOICES: tl.constexpr,
    B_CHOICES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m: tl.constexpr = (M + BM - 1) // BM
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    for tile in range(tl.program_id(0), E * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tl.load(ranked + tile // (tiles_m * tiles_n))
        inside = tile % (tiles_m * tiles_n)
        first = inside // (GROUP * tiles_n) * GROUP
        size = tl.minimum(tiles_m - first, GROUP)
        m = columns_of(first + inside % (GROUP * tiles_n) % size, BM)
        n = columns_of(inside % (GROUP * tiles_n) // size, BN)
        end = tl.load(ends + expert)
        total = tl.zeros((BM, BN), tl.float32)
        for row in range(tl.load(ends + expert - 1, mask=expert > 0, other=0), end, BK):
            _, a_rows, live = rows_of(order, row, end, A_CHOICES, BK)
            _, b_rows, _ = rows_of(order, row, end, B_CHOICES, BK)
            a_at, b_at = a + a_rows[:, None] * M + m[None, :], b + b_rows[:, None] * N + n[None, :]
            a_KM = tl.load(a_at, mask=live[:, None] & (m < M)[None, :], other=0.0)
            b_KN = tl.load(b_at, mask=live[:, None] & (n < N)[None, :], other=0.0)
            total = tl.dot(tl.trans(a_KM), b_KN, total)
        to = out + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


class TritonStages:
    """Implements `stages.Stages`: five products, each one kernel, and the sum over a token's rows."""

    def up(self, x: Tensor, w_in: Tensor, layout: Layout, activation: str) -> tuple[Tensor, Tensor]:
        """Gather, product and activation in one kernel."""
        gated, rows = activation == "swiglu", _rows(x, layout)
        hidden = x.new_empty(rows, w_in.shape[1])
        width = w_in.shape[1] // (2 if gated else 1)
        activated = x.new_empty(rows, width)
        table = table_of(layout, rows, UP.M)
        up_kernel[(_programs(x),)](
            x,
            _order(layout),
            w_in.contiguous(),
            layout.ends_E,
            table.tiles,
            table.total,
            hidden,
            activated,
            x.shape[1],
            width,
            _choices(layout),
            gated,
            *UP[:3],
            GROUP,
            num_warps=UP.warps,
            num_stages=UP.stages,
        )
        return hidden, activated

    def down(self, activated: Tensor, w_out: Tensor, layout: Layout) -> Tensor:
        """One product."""
        return self.rows_product(activated, w_out.contiguous().mT, layout)

    def down_backward(
        self, grad: Tensor, gate_N: Tensor | None, w_out: Tensor, hidden: Tensor, layout: Layout, activation: str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The first kernel gathers, multiplies, and has the activation's derivative as its epilogue."""
        rows, (_, width, inner) = hidden.shape[0], w_out.shape
        grad_hidden, scaled = torch.empty_like(hidden), hidden.new_empty(rows, inner)
        table = table_of(layout, rows, DOWN_BACKWARD.M)
        partial = grad.new_zeros(triton.cdiv(inner, DOWN_BACKWARD.N), rows, dtype=torch.float32)
        down_backward_kernel[(_programs(grad),)](
            grad,
            grad if gate_N is None else gate_N,
            _order(layout),
            w_out.contiguous(),
            hidden,
            layout.ends_E,
            table.tiles,
            table.total,
            grad_hidden,
            scaled,
            partial,
            rows,
            width,
            inner,
            _choices(layout),
            activation == "swiglu",
            gate_N is not None,
            *DOWN_BACKWARD[:3],
            GROUP,
            num_warps=DOWN_BACKWARD.warps,
            num_stages=DOWN_BACKWARD.stages,
        )
        grad_w_out = self.weights_product(grad, scaled, layout, gathered="a")
        if gate_N is None:
            return grad_hidden, None, grad_w_out
        return grad_hidden, partial.sum(0).index_select(0, layout.position_N).to(gate_N.dtype), grad_w_out

    def up_backward(self, grad: Tensor, x: Tensor, w_in: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Two products, of which one gathers."""
        grad_w_in = self.weights_product(grad, x, layout, gathered="b")
        return self.rows_product(grad, w_in.contiguous(), layout), grad_w_in

    def combine(self, y_RD: Tensor, gate_N: Tensor | None, layout: Layout) -> Tensor:
        """As `passes.combine`."""
        return passes.combine(y_RD, gate_N, layout)

    def rows_product(self, a: Tensor, w_EKN: Tensor, layout: Layout) -> Tensor:
        """Rows (R, K) times the weights of their experts, (R, N)."""
        _, inner, width = w_EKN.shape
        out = a.new_empty(a.shape[0], width)
        table = table_of(layout, a.shape[0], ROWS.M)
        rows_kernel[(_programs(a),)](
            a,
            w_EKN,
            layout.ends_E,
            table.tiles,
            table.total,
            out,
            width,
            inner,
            w_EKN.stride(2),
            w_EKN.stride(1),
            *ROWS[:3],
            GROUP,
            num_warps=ROWS.warps,
            num_stages=ROWS.stages,
        )
        return out

    def weights_product(self, a: Tensor, b: Tensor, layout: Layout, gathered: str) -> Tensor:
        """a^T b along the rows of each expert, (E, M, N).

        Args:
            a: rows (R, M).
            b: rows (R, N).
            layout: of the rows.
            gathered: `a` or `b`, which has tokens instead if the layout has an order.
        """
        rows = (b if gathered == "a" else a).shape[0]
        out = a.new_empty(layout.ends_E.shape[0], a.shape[1], b.shape[1])
        choices = _choices(layout)
        weights_kernel[(_programs(a),)](
            a,
            b,
            _order(layout),
            layout.ends_E,
            table_of(layout, rows, WEIGHTS.M).ranked,
            out,
            *out.shape,
            choices if gathered == "a" else 0,
            choices if gathered == "b" else 0,
            *WEIGHTS[:3],
            GROUP,
            num_warps=WEIGHTS.warps,
            num_stages=WEIGHTS.stages,
        )
        return out


class MixedStages(TritonStages):
    """The two products with an activation beside them in Triton, the four others by torch's grouped product."""

    @override
    def rows_product(self, a: Tensor, w_EKN: Tensor, layout: Layout) -> Tensor:
        return grouped_mm(a, w_EKN, layout.ends_E)

    @override
    def weights_product(self, a: Tensor, b: Tensor, layout: Layout, gathered: str) -> Tensor:
        a, b = (passes.gather(x, layout) if name == gathered else x for name, x in (("a", a), ("b", b)))
        return passes.clear_unused(grouped_mm(a.mT, b, layout.ends_E), layout)


GROUP = 8
"""Tiles of rows that take turns before the next columns, so that both stay in the cache."""


def _rows(x: Tensor, layout: Layout) -> int:
    return (x if layout.order_R is None else layout.order_R).shape[0]


def _order(layout: Layout) -> Tensor:
    """The order of the rows, or a tensor that no kernel reads."""
    return layout.ends_E if layout.order_R is None else layout.order_R


def _choices(layout: Layout) -> int:
    """K; 0: nothing is gathered."""
    return 0 if layout.order_R is None else layout.choices


def _programs(x: Tensor) -> int:
    """As many as run at a time; on the CPU, in Triton's interpreter, a few that share the tiles."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
