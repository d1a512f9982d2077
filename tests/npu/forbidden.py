"""Calls that the documentation of op-plugin forbids and torch_npu lets pass."""

import torch

npu = torch.ops.npu
R, D, F, E = 8, 6, 4, 4


def there(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device="npu")


def whole(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype).npu()


def grouped(x=None, weight=None, groups=None, kind=1, group_type=0, **options):
    x = there(R, D) if x is None else x
    weight = there(E, D, F) if weight is None else weight
    groups = whole(2, 3, 3, 0) if groups is None else groups
    options = {"split_item": 3, **options}
    return npu.npu_grouped_matmul(
        [x], [weight], group_list=groups, group_list_type=kind, group_type=group_type, **options
    )


def attention(q=(2, 5, 4, 8), k=(2, 5, 2, 8), heads=4, layout="BSND", v=None, dtype=torch.float32, **options):
    q, k, v = there(*q), there(*k), there(*(v or k), dtype=dtype)
    return npu.npu_fusion_attention(q, k, v, heads, layout, **options)


def rotary(x=(2, 5, 3, 8), cos=(1, 5, 1, 8), mode="half"):
    return npu.npu_rotary_mul(there(*x), there(*cos), there(*cos), mode)


def unpermuted(places=None, probs=None):
    places = whole(*range(R), dtype=torch.int32) if places is None else places
    return npu.npu_moe_token_unpermute(there(R, D), places, probs=there(4, 2) if probs is None else probs)


FORBIDDEN = {
    "grouped matmul: counts of int32": lambda: grouped(groups=whole(2, 3, 3, 0, dtype=torch.int32)),
    "grouped matmul: rows behind the last group": lambda: grouped(groups=whole(2, 3, 2, 0)),
    "grouped matmul: sums that end early": lambda: grouped(groups=whole(2, 5, 7, 7), kind=0),
    "grouped matmul: sums that fall": lambda: grouped(groups=whole(2, 9, 8, 8), kind=0),
    "grouped matmul: counts taken for sums": lambda: grouped(groups=whole(2, 3, 3, 0), kind=0),
    "grouped matmul: sums taken for counts": lambda: grouped(groups=whole(2, 5, 8, 8), kind=1),
    "grouped matmul: a group too few": lambda: grouped(groups=whole(2, 3, 3)),
    "grouped matmul: one count": lambda: grouped(weight=there(1, D, F), groups=whole(R)),
    "grouped matmul: no groups": lambda: npu.npu_grouped_matmul(
        [there(R, D)], [there(E, D, F)], split_item=3, group_type=0
    ),
    "grouped matmul: float64": lambda: grouped(there(R, D, dtype=torch.float64), there(E, D, F, dtype=torch.float64)),
    "grouped matmul: two types": lambda: grouped(weight=there(E, D, F, dtype=torch.bfloat16)),
    "grouped matmul: other inner dims": lambda: grouped(weight=there(E, D + 1, F)),
    "grouped matmul: a transposed x": lambda: grouped(there(D, R).t()),
    "grouped matmul: a result for each group": lambda: grouped(split_item=0),
    "grouped matmul by columns: x as it is": lambda: grouped(there(D, R), there(R, F), group_type=2),
    "grouped matmul by columns: groups of other columns": lambda: grouped(
        there(R, D).t(), there(R, F), whole(2, 3, 2, 0), group_type=2
    ),
    "rms norm: a gamma of another width": lambda: npu.npu_rms_norm(there(R, D), there(D + 1)),
    "rms norm: a gamma of lower precision": lambda: npu.npu_rms_norm(there(R, D), there(D, dtype=torch.bfloat16)),
    "rms norm: float64": lambda: npu.npu_rms_norm(there(R, D, dtype=torch.float64), there(D, dtype=torch.float64)),
    "swiglu: an odd width": lambda: npu.npu_swiglu(there(R, 7)),
    "swiglu: not contiguous": lambda: npu.npu_swiglu(there(D, R).t()),
    "swiglu: empty": lambda: npu.npu_swiglu(there(0, D)),
    "swiglu: integers": lambda: npu.npu_swiglu(there(R, D, dtype=torch.int32)),
    "rotary: narrow cosines": lambda: rotary(cos=(1, 5, 1, 4)),
    "rotary: one cosine for all positions": lambda: rotary(cos=(1, 1, 1, 8)),
    "rotary: cosines of other positions": lambda: rotary(cos=(1, 4, 1, 8)),
    "rotary: an odd width": lambda: rotary((2, 5, 3, 7), (1, 5, 1, 7)),
    "rotary: an unknown mode": lambda: rotary(mode="quarter"),
    "rotary: many heads": lambda: rotary((1, 2, 1000, 2), (1, 2, 1, 2)),
    "rotary: many sequences": lambda: rotary((1000, 2, 1, 2), (1, 2, 1, 2)),
    "rotary: many heads of all sequences": lambda: rotary((2, 2, 500, 2), (1, 2, 1, 2), "interleave"),
    "permute: indices that are no integers": lambda: npu.npu_moe_token_permute(there(4, D), there(4, 2)),
    "permute: indices of other tokens": lambda: npu.npu_moe_token_permute(there(4, D), whole(*range(5))),
    "permute: float64": lambda: npu.npu_moe_token_permute(there(4, D, dtype=torch.float64), whole(*range(4))),
    "permute: negative indices": lambda: npu.npu_moe_token_permute(there(2, D), whole(0, -1)),
    "unpermute: fewer rows than places": lambda: unpermuted(whole(*range(R + 2), dtype=torch.int32), there(5, 2)),
    "unpermute: a place twice": lambda: unpermuted(whole(0, 1, 2, 3, 4, 5, 6, 6, dtype=torch.int32)),
    "unpermute: places of int64": lambda: unpermuted(whole(*range(R))),
    "unpermute: probabilities of other tokens": lambda: unpermuted(probs=there(3, 2)),
    "attention: an unknown layout": lambda: attention(layout="NSBD"),
    "attention: another number of heads": lambda: attention(heads=5),
    "attention: heads that cannot be shared": lambda: attention(k=(2, 5, 3, 8)),
    "attention: two types": lambda: attention(dtype=torch.bfloat16),
    "attention: keys of another width": lambda: attention(k=(2, 5, 2, 4)),
    "attention: more keys than values": lambda: attention(v=(2, 4, 2, 8)),
    "attention: heads that are too wide": lambda: attention((1, 2, 1, 769), (1, 2, 1, 769), 1),
    "attention: a mask of numbers": lambda: attention(atten_mask=there(5, 5)),
    "attention: a mask of another shape": lambda: attention(atten_mask=there(5, 4, dtype=torch.bool)),
    "attention: a small triangle": lambda: attention(atten_mask=there(5, 5, dtype=torch.bool), sparse_mode=2),
    "gating: more experts than there are": lambda: npu.npu_moe_gating_top_k_softmax(there(R, E), k=E + 1),
    "gating: no experts": lambda: npu.npu_moe_gating_top_k_softmax(there(R, E), k=0),
    "gating: unequal groups": lambda: npu.npu_moe_gating_top_k(there(R, 10), 2, group_count=3),
    "gating: more experts than the groups have": lambda: npu.npu_moe_gating_top_k(
        there(R, 8), 5, group_count=2, k_group=1
    ),
    "gating: a bias of another type": lambda: npu.npu_moe_gating_top_k(
        there(R, 8, dtype=torch.bfloat16), 2, bias=there(8)
    ),
}
"""By name, a function that makes the call."""
