"""npu_fusion_attention: softmax(scale * q k^T, hidden where the mask is true) v; heads of q may share one of k."""

import functools
import math

import torch

from tests.npu.emulation.fused.rules import emulated, need, need_one_type, need_types

TO_BNSD = {
    "BNSD": lambda x, heads: x,
    "BSND": lambda x, heads: x.transpose(1, 2),
    "BSH": lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2),
    "SBH": lambda x, heads: x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3),
}
FROM_BNSD = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2),
    "BSH": lambda x: x.transpose(1, 2).flatten(2),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
}
DIMS = {"BNSD": 4, "BSND": 4, "BSH": 3, "SBH": 3}
MOST_HEADS, MOST_WIDTH = 256, 768
GIVEN, ALL_GIVEN, LEFT_UP, RIGHT_DOWN = 0, 1, 2, 3
"""Values of sparse_mode: the mask is as given; or it is the triangle of 2048, moved to either corner of the scores."""
TRIANGLE = 2048
NO_LIMIT = 2147483647


def attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0,
              keep_prob=1.0, pre_tockens=NO_LIMIT, next_tockens=NO_LIMIT, inner_precise=0, prefix=None,
              actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
              softmax_layout="", sink=None, dropout_mask=None, seed=0, offset=0):  # fmt: skip
    unused = {"pse": pse, "padding_mask": padding_mask, "prefix": prefix, "actual_seq_qlen": actual_seq_qlen}
    unused |= {"actual_seq_kvlen": actual_seq_kvlen, "sink": sink, "dropout_mask": dropout_mask}
    _check_options(keep_prob, pre_tockens, next_tockens, unused)
    q, k, v = _heads(query, key, value, head_num, input_layout)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = _score(q, k, scale, _hidden(atten_mask, sparse_mode, q, k))
    top = score.amax(-1, keepdim=True)
    weight = torch.exp(score - top)
    total = weight.sum(-1, keepdim=True)
    out = FROM_BNSD[input_layout](weight / total @ v).contiguous().to(query.dtype)
    rows = [x.expand(*x.shape[:-1], 8).contiguous() for x in (top, total)]  # as the device keeps them
    return out, *rows, query.new_empty(0), 0, 0, 0


def attention_backward(query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None, atten_mask=None,
                       softmax_max=None, softmax_sum=None, softmax_in=None, attention_in=None, scale_value=1.0,
                       keep_prob=1.0, pre_tockens=NO_LIMIT, next_tockens=NO_LIMIT, inner_precise=0, seed=0, offset=0,
                       numels=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
                       gen_mask_parallel=True, sync=False, softmax_layout="", sink=None):  # fmt: skip
    unused = {"pse": pse, "padding_mask": padding_mask, "prefix": prefix, "actual_seq_qlen": actual_seq_qlen}
    _check_options(keep_prob, pre_tockens, next_tockens, unused | {"actual_seq_kvlen": actual_seq_kvlen, "sink": sink})
    q, k, v = _heads(query, key, value, head_num, input_layout)
    kv_heads = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // kv_heads, 1) for x in (k, v))
    d_out, out = (TO_BNSD[input_layout](x.float(), head_num) for x in (dy, attention_in))
    score = _score(q, k, scale_value, _hidden(atten_mask, sparse_mode, q, k))
    weight = torch.exp(score - softmax_max[..., :1]) / softmax_sum[..., :1]
    d_score = weight * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True)) * scale_value
    d_k, d_v = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (d_score.mT @ q, weight.mT @ d_out))
    found = (FROM_BNSD[input_layout](x).contiguous().to(query.dtype) for x in (d_score @ k, d_k, d_v))
    return *found, query.new_empty(0), query.new_empty(0)


def _check_options(keep_prob, before, after, unused):
    used = [name for name, value in unused.items() if value is not None]
    emulated(not used and keep_prob == 1, f"{', '.join(used)} keep_prob {keep_prob}")
    emulated(min(before, after) >= NO_LIMIT, "limits by pre_tockens and next_tockens")


def _heads(query, key, value, head_num, layout):
    """The three as [batch, heads, positions, width] in float32."""
    need(layout in {*DIMS, "TND"}, f"input_layout is one of {', '.join(DIMS)}, TND (got {layout})")
    emulated(layout != "TND", "the layout TND")
    need_one_type(query=query, key=key, value=value)
    need({x.dim() for x in (query, key, value)} == {DIMS[layout]}, f"{layout} has {DIMS[layout]} dims")
    flat = DIMS[layout] == 3
    need(not flat or query.shape[-1] % head_num == 0, "the width is that of head_num heads")
    kv_heads = key.shape[-1] * head_num // query.shape[-1] if flat else head_num
    q = TO_BNSD[layout](query.float(), head_num)
    k, v = (TO_BNSD[layout](x.float(), kv_heads) for x in (key, value))
    need(q.shape[1] == head_num, f"head_num is the number of heads of query (got {head_num}, {q.shape[1]})")
    need(1 <= q.shape[1] <= MOST_HEADS, f"1 to {MOST_HEADS} heads")
    need(k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0, "heads of query are a multiple of those of key")
    need(q.shape[0] == k.shape[0] == v.shape[0] and k.shape[2] == v.shape[2], "equal batches, and keys as values")
    need(MOST_WIDTH >= q.shape[3] == k.shape[3] >= v.shape[3] > 0, f"query as wide as key, at most {MOST_WIDTH}")
    return q, k, v


def _hidden(mask, mode, q, k):
    """Where scores are hidden; None where none are. Without a mask, sparse_mode has no effect."""
    if mask is None:
        return None
    need_types((torch.bool, torch.uint8), atten_mask=mask)
    emulated(mode in (GIVEN, ALL_GIVEN, LEFT_UP, RIGHT_DOWN), f"sparse_mode {mode}")
    (batch, heads, rows), columns = q.shape[:3], k.shape[2]
    if mode in (LEFT_UP, RIGHT_DOWN):
        need(torch.equal(mask.bool(), _triangle()), f"sparse_mode {mode} has the triangle of {TRIANGLE} as its mask")
        moved = columns - rows if mode == RIGHT_DOWN else 0
        return torch.ones(rows, columns, dtype=torch.bool).triu(1 + moved)
    shapes = [(rows, columns), *((b, n, rows, columns) for b, n in ((1, 1), (batch, 1), (batch, heads)))]
    need(tuple(mask.shape) in shapes, f"atten_mask is {' or '.join(map(str, shapes))} (got {tuple(mask.shape)})")
    return mask.bool()


@functools.cache
def _triangle():
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool).triu(1)


def _score(q, k, scale, hidden):
    score = q @ k.mT * scale
    if hidden is None:
        return score
    emulated(not hidden.all(-1).any(), "a query that sees no key")
    return score.masked_fill(hidden, -math.inf)


OPERATORS = {"npu_fusion_attention": attention, "npu_fusion_attention_grad": attention_backward}
