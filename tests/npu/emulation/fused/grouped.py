"""npu_grouped_matmul of one x and one weight: a product for each group of rows, or of columns for their gradients."""

import torch

from tests.npu.emulation.fused.rules import emulated, need, need_one_type, need_types

SUMS, COUNTS = 0, 1
"""What group_list_type says that group_list holds."""
ROWS, COLUMNS = 0, 2
"""What group_type says is grouped: the rows of x, or the dim that is summed."""
MOST_GROUPS = 1024
INNER_LIMIT = 65536


def grouped_matmul(
    x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=SUMS, act_type=0, **others
):
    given = [name for name, value in others.items() if value is not None]
    emulated(not given and not act_type, f"{', '.join(given)} act_type {act_type}")
    emulated(len(x) == len(weight) == 1, "several x or weights")
    need(split_item in (2, 3), f"split_item is 2 or 3 for one result (got {split_item})")
    (x,), (weight,) = x, weight
    need_one_type(x=x, weight=weight)
    need(max(x.shape[-1], weight.shape[-1]) < INNER_LIMIT, f"last dims are below {INNER_LIMIT}")
    product = {ROWS: _by_rows, COLUMNS: _by_columns}.get(group_type)
    emulated(product is not None, f"group_type {group_type}")
    return [product(x, weight, _counts(group_list, group_list_type))]


def _counts(group_list, kind):
    """The sizes of the groups."""
    need(group_list is not None, "group_list is given")
    need_types((torch.int64,), group_list=group_list)
    need(group_list.dim() == 1 and len(group_list) <= MOST_GROUPS, f"group_list has 1 dim, at most {MOST_GROUPS} long")
    values = group_list.tolist()
    if kind == COUNTS:
        need(len(values) != 1, "counts of more than one group")
        counts = values
    else:
        need(kind == SUMS, f"group_list_type is 0 or 1 for these types (got {kind})")
        counts = [end - start for start, end in zip([0, *values], values, strict=False)]
    need(min(counts) >= 0, f"no group is negative (got {values} with group_list_type {kind})")
    return counts


def _by_rows(x, weight, counts):
    need(x.dim() == 2 and weight.dim() == 3, f"x has 2 dims and weight 3 (got {x.dim()}, {weight.dim()})")
    need(x.is_contiguous(), "x is not transposed")
    need(x.shape[1] == weight.shape[1], f"x and weight share K (got {tuple(x.shape)}, {tuple(weight.shape)})")
    need(len(counts) == len(weight), f"a group for each weight (got {len(counts)} for {len(weight)})")
    need(sum(counts) == len(x), f"the groups have the rows of x (got {sum(counts)} for {len(x)})")
    parts = [rows.float() @ matrix.float() for rows, matrix in zip(x.split(counts), weight, strict=True)]
    return torch.cat(parts).to(x.dtype)


def _by_columns(x, weight, counts):
    need(x.dim() == weight.dim() == 2, f"x and weight have 2 dims (got {x.dim()}, {weight.dim()})")
    need(x.mT.is_contiguous() and weight.is_contiguous(), "x is transposed and weight is not")
    need(x.shape[1] == weight.shape[0], f"x and weight share K (got {tuple(x.shape)}, {tuple(weight.shape)})")
    need(sum(counts) == x.shape[1], f"the groups have the columns of x (got {sum(counts)} for {x.shape[1]})")
    parts = zip(x.split(counts, 1), weight.split(counts), strict=True)
    products = torch.stack([columns.float() @ rows.float() for columns, rows in parts]).to(x.dtype)
    empty = torch.tensor(counts) == 0
    return products.masked_fill(empty[:, None, None], torch.nan)  # what is left there is not documented


OPERATORS = {"npu_grouped_matmul": grouped_matmul}
