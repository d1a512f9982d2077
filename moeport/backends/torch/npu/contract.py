"""What the documentation of torch-npu's operators forbids and their shape inference lets through.

Each function yields what is wrong with the arguments of one operator, reading shapes, types and strides only: it never
waits for the device. It needs no torch_npu, and takes tensors of any device, also `meta`.

The limits are those of op-plugin's pages on each operator; where an operator has no page (permute, unpermute), those of
the CANN operator that it calls, aclnnMoeTokenPermute and aclnnMoeTokenUnpermute. None of it was run on hardware.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from moeport.errors import MoeportError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

MAX_GROUPS = 1024
"""Of npu_grouped_matmul with one weight of three dimensions."""
INNER_LIMIT = 65_536
"""The last dimensions of npu_grouped_matmul are below it."""
MAX_ROTARY_WIDTH = 896
"""The head width of npu_rotary_mul is below it."""
MAX_ROTARY_COUNT = 1000
"""The numbers of sequences and of heads of npu_rotary_mul are below it."""
MAX_HEADS, MAX_HEAD_WIDTH, MAX_SEQUENCE, MAX_BATCH = 256, 768, 2**20, 2**21
"""Of npu_fusion_attention."""
CAUSAL_MASK = 2048
"""Side of the mask that stands for a causal one of any size (sparse_mode 2 and 3)."""
GIVEN, LEFT_UP = 1, 2
"""Values of its sparse_mode: a mask of all pairs (allMask); one that stands for a causal mask (leftUpCausal)."""
MAX_CHOICES = 512
"""Experts per token of npu_moe_token_permute and unpermute."""
MAX_INDEX = 16_777_215
"""Indices of npu_moe_token_permute, and their number, are below it."""


class ContractError(MoeportError):
    """An operator of torch-npu would be called in a way that its documentation forbids."""


def check(operator: str, problems: Iterable[str]) -> None:
    """Raises ContractError with the first problem."""
    for problem in problems:
        raise ContractError(f"{operator}: {problem}")


def first(problems: Iterable[str]) -> str | None:
    """The first problem; None if there is none."""
    return next(iter(problems), None)


def _float_types(**tensors: Tensor) -> Iterator[str]:
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            yield f"{name} is {_type(x)}; expected float16, bfloat16 or float32"


def _same_type(**tensors: Tensor) -> Iterator[str]:
    yield from _float_types(**tensors)
    (name, x), *others = tensors.items()
    for other, y in others:
        if y.dtype != x.dtype:
            yield f"{other} is {_type(y)}; expected {_type(x)}, as {name} is"


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def rms_norm(x: Tensor, weight: Tensor) -> Iterator[str]:
    """npu_rms_norm over the last dimension."""
    yield from _float_types(x=x, weight=weight)
    if weight.dtype not in (x.dtype, torch.float32):
        expected = "float32" if x.dtype == torch.float32 else f"{_type(x)} or float32"
        yield f"weight is {_type(weight)}; expected {expected}"
    if not 2 <= x.dim() <= 8:
        yield f"x has {x.dim()} dimensions; expected 2 to 8"
    elif tuple(weight.shape) != (x.shape[-1],):
        yield f"weight has the shape {_shape(weight)}; expected ({x.shape[-1]},), the last dimension of x"


def heads(x: Tensor) -> Iterator[str]:
    """What npu_rotary_mul in mode half asks of x (B, S, H, A)."""
    yield from _float_types(x=x)
    if x.dim() != 4:
        yield f"x has {x.dim()} dimensions; expected 4"
        return
    batch, _, count, width = x.shape
    if width % 2 or width >= MAX_ROTARY_WIDTH:
        yield f"the heads have the width {width}; expected an even one below {MAX_ROTARY_WIDTH}"
    if batch >= MAX_ROTARY_COUNT or count >= MAX_ROTARY_COUNT:
        yield f"there are {batch} sequences and {count} heads; expected fewer than {MAX_ROTARY_COUNT} each"


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[str]:
    """npu_rotary_mul in mode half: x (B, S, H, A); cos and sin (1, S, 1, A) or (B, S, 1, A)."""
    yield from _same_type(x=x, cos=cos, sin=sin)
    yield from heads(x)
    for name, table in (("cos", cos), ("sin", sin)):
        expected = [(batch, x.shape[1], 1, x.shape[-1]) for batch in (1, x.shape[0])]
        if tuple(table.shape) not in expected:
            yield f"{name} has the shape {_shape(table)}; expected {expected[0]} or {expected[1]}"


def swiglu(x: Tensor) -> Iterator[str]:
    """npu_swiglu over the last dimension."""
    yield from _float_types(x=x)
    if not 1 <= x.dim() <= 8:
        yield f"x has {x.dim()} dimensions; expected 1 to 8"
        return
    if x.shape[-1] % 2:
        yield f"x has the width {x.shape[-1]}; expected an even one"
    if not x.numel():
        yield f"x has the shape {_shape(x)}; expected at least one element"


def contiguous(x: Tensor) -> Iterator[str]:
    """What npu_swiglu asks of the strides of x."""
    if not x.is_contiguous():
        yield f"x of the shape {_shape(x)} has the strides {x.stride()}; expected a contiguous tensor"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    """What npu_fusion_attention asks of q (B, S, H, A), and of k and v (B, S, G, A)."""
    yield from _same_type(q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = f"{_shape(q)}, {_shape(k)} and {_shape(v)}"
        yield f"q, k and v have the shapes {shapes}; expected (B, S, H, A), and twice (B, S, G, A)"
        return
    (batch, sequence, heads, width), groups = q.shape, k.shape[2]
    if (k.shape[0], k.shape[3]) != (batch, width):
        yield f"q and k have the shapes {_shape(q)} and {_shape(k)}; expected the same batch and head width"
    if not 1 <= heads <= MAX_HEADS or not groups or heads % groups:
        yield f"{heads} query heads read {groups} heads of k and v; expected 1 to {MAX_HEADS}, a multiple of the latter"
    step = 4 if q.dtype == torch.float32 else 1
    if not 1 <= width <= MAX_HEAD_WIDTH or width % step:
        in_type = ", in float32 a multiple of 4" if step > 1 else ""
        yield f"the heads have the width {width}; expected 1 to {MAX_HEAD_WIDTH}{in_type}"
    if not (1 <= sequence <= MAX_SEQUENCE and 1 <= k.shape[1] <= MAX_SEQUENCE and 1 <= batch <= MAX_BATCH):
        lengths = f"{batch} sequences, of {sequence} queries and {k.shape[1]} keys"
        yield f"there are {lengths}; expected 1 to {MAX_BATCH}, of 1 to {MAX_SEQUENCE}"


def fusion_attention(
    q: Tensor, k: Tensor, v: Tensor, *, head_num: int, input_layout: str, atten_mask: Tensor | None, sparse_mode: int
) -> Iterator[str]:
    """npu_fusion_attention without dropout, bias or lengths; only the layout BSND is used here."""
    if input_layout != "BSND":
        yield f"input_layout is {input_layout}; expected BSND"
    yield from attention(q, k, v)
    if q.dim() == 4 and head_num != q.shape[2]:
        yield f"head_num is {head_num}; expected {q.shape[2]}, the heads of q"
    if sparse_mode not in (0, GIVEN, LEFT_UP):
        yield f"sparse_mode is {sparse_mode}; expected 0, {GIVEN} for all pairs, {LEFT_UP} for a causal mask"
    if atten_mask is None:
        if sparse_mode:
            yield f"atten_mask is missing; expected one with sparse_mode {sparse_mode}"
        return
    if atten_mask.dtype not in (torch.bool, torch.uint8):
        yield f"atten_mask is {_type(atten_mask)}; expected bool or uint8"
    shapes = {LEFT_UP: (CAUSAL_MASK, CAUSAL_MASK), GIVEN: (q.shape[0], 1, q.shape[1], k.shape[1])}
    expected = shapes.get(sparse_mode, (q.shape[1], k.shape[1]))
    if tuple(atten_mask.shape) != expected:
        yield f"atten_mask has the shape {_shape(atten_mask)}; expected {expected} with sparse_mode {sparse_mode}"


def experts(count: int, *widths: int) -> Iterator[str]:
    """What npu_grouped_matmul asks of the number of groups and of the widths of its matrices."""
    if count > MAX_GROUPS:
        yield f"there are {count} experts on this rank; expected at most {MAX_GROUPS}"
    for width in widths:
        if width >= INNER_LIMIT:
            yield f"a width is {width}; expected less than {INNER_LIMIT}"


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, *, group_type: int) -> Iterator[str]:
    """npu_grouped_matmul with one x, one weight and rows per group (group_list_type 1).

    Args:
        x: (R, K), and row-major; or for group_type 2 (M, R), the transpose of a row-major one.
        weight: (E, K, N); or for group_type 2 (R, N).
        counts: (E,) int64, whose sum must be R, which is not checked: that would wait for the device.
        group_type: 0: x and the result are in groups along the rows. 2: along the dimension that is summed over.
    """
    yield from _same_type(x=x, weight=weight)
    if group_type not in (0, 2):
        yield f"group_type is {group_type}; expected 0 or 2"
        return
    dims = 3 if group_type == 0 else 2
    if x.dim() != 2 or weight.dim() != dims:
        yield f"x and weight have {x.dim()} and {weight.dim()} dimensions; expected 2 and {dims}"
        return
    if x.shape[1] != weight.shape[-2]:
        yield f"x and weight have the shapes {_shape(x)} and {_shape(weight)}; expected equal inner dimensions"
    contiguous = 1 if group_type == 0 else 0
    if x.stride(contiguous) != 1 and x.shape[contiguous] > 1:
        expected = "a row-major matrix" if group_type == 0 else "the transpose of one"
        yield f"x has the strides {x.stride()}; expected {expected}"
    if not x.numel():
        yield f"x has the shape {_shape(x)}; expected at least one element"
    yield from group_list(counts, weight.shape[0] if group_type == 0 else None)
    inner = (x.shape[1], weight.shape[-1]) if group_type == 0 else (x.shape[0], weight.shape[-1])
    yield from experts(counts.numel(), *inner)


def group_list(counts: Tensor, groups: int | None) -> Iterator[str]:
    """The rows per group of npu_grouped_matmul: int64, one dimension, one entry per group, and more than one group."""
    if counts.dtype != torch.int64:
        yield f"group_list is {_type(counts)}; expected int64"
    if counts.dim() != 1 or (groups is not None and counts.numel() != groups):
        expected = "one dimension" if groups is None else f"({groups},)"
        yield f"group_list has the shape {_shape(counts)}; expected {expected}, with one entry per group"
    elif counts.numel() == 1:
        yield "group_list has one entry; expected at least 2, since one group is a plain product"


def group_sizes(counts: list[int], rows: int) -> Iterator[str]:
    """What the rows per group must be. For a list on the host: reading it from the device waits for it."""
    if min(counts) < 0:
        yield f"group_list is {counts}; expected counts of at least 0"
    elif sum(counts) != rows:
        yield f"group_list covers {sum(counts)} rows; expected all {rows}"


def _index(name: str, index: Tensor, types: tuple[torch.dtype, ...]) -> Iterator[str]:
    if index.dtype not in types:
        expected = " or ".join(str(kind).removeprefix("torch.") for kind in types)
        yield f"{name} is {_type(index)}; expected {expected}"
    if index.numel() >= MAX_INDEX:
        yield f"{name} has {index.numel()} entries; expected fewer than {MAX_INDEX}"


def assignments(tokens: int, choices: int | None, num_experts: int | None = None) -> Iterator[str]:
    """What npu_moe_token_permute and unpermute ask of the numbers of tokens, of experts per token, and of experts."""
    if choices is None:
        yield "experts choose tokens, or rows are rounded; expected K rows per token"
    elif choices > MAX_CHOICES:
        yield f"a token has {choices} experts; expected at most {MAX_CHOICES}"
    elif num_experts is not None and choices > num_experts:
        yield f"a token has {choices} experts of {num_experts}; expected at most {num_experts}"
    elif tokens * choices >= MAX_INDEX:
        yield f"there are {tokens * choices} assignments; expected fewer than {MAX_INDEX}"


def token_permute(x: Tensor, indices: Tensor) -> Iterator[str]:
    """npu_moe_token_permute: x (T, D), indices (T, K)."""
    yield from _float_types(x=x)
    yield from _index("indices", indices, (torch.int32, torch.int64))
    if x.dim() != 2 or indices.dim() != 2 or indices.shape[0] != x.shape[0]:
        yield f"x and indices have the shapes {_shape(x)} and {_shape(indices)}; expected (T, D) and (T, K)"
    else:
        yield from assignments(*indices.shape)


def token_unpermute(rows: Tensor, sorted_indices: Tensor, probs: Tensor) -> Iterator[str]:
    """npu_moe_token_unpermute: rows (N, D), sorted_indices (N,), the row of each assignment; probs (T, K)."""
    yield from _same_type(rows=rows, probs=probs)
    yield from _index("sorted_indices", sorted_indices, (torch.int32,))
    if rows.dim() != 2 or probs.dim() != 2 or tuple(sorted_indices.shape) != (probs.numel(),):
        shapes = f"{_shape(rows)}, {_shape(sorted_indices)} and {_shape(probs)}"
        yield f"rows, sorted_indices and probs have the shapes {shapes}; expected (N, D), (N,) and (T, K) with N = T K"
    elif rows.shape[0] != probs.numel():
        yield f"there are {rows.shape[0]} rows; expected {probs.numel()}, one for each entry of probs"
    else:
        yield from assignments(*probs.shape)
