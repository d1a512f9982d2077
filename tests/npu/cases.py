"""Calls of the fused operators, with PyTorch's own way to the same values; and calls that are forbidden."""

import torch
import torch.nn.functional as F

npu = torch.ops.npu
# Operators are looked up when they are called: without torch_npu the tests are collected too, and skipped.


def rotated_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotated_pairs(x):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j).flatten(-2)


def plain_attention(q, k, v, hidden=None):
    """For [batch, positions, heads, width]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = None if hidden is None else ~hidden
    return F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).transpose(1, 2)


def triangle(rows, columns, moved=0):
    return torch.ones(rows, columns, dtype=torch.bool).triu(1 + moved)


def heads_last(x):
    return x.flatten(2)


CHOSEN_TK = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1]])
COUNTS_E = torch.bincount(CHOSEN_TK.flatten(), minlength=4)  # nobody chose the last expert
KEPT = 6
ROW_KEPT_TK = torch.argsort(torch.argsort(CHOSEN_TK.flatten(), stable=True)).view(4, 2) < KEPT


def there_and_back(x, p, kept=None):
    rows, places = npu.npu_moe_token_permute(x, CHOSEN_TK.npu(), num_out_tokens=kept)
    rows = F.pad(rows, (0, 0, 0, CHOSEN_TK.numel() - len(rows)))  # unpermute wants those that were dropped, too
    return npu.npu_moe_token_unpermute(rows * 2, places, probs=p)


def plain_there_and_back(x, p, kept=None):
    weight = p if kept is None else p * ROW_KEPT_TK
    return 2 * x * weight.sum(1, keepdim=True)


def attention(layout, **options):
    def run(q, k, v):
        options_there = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return npu.npu_fusion_attention(q, k, v, 4, layout, scale=0.3, **options_there)[0]

    return run


ATTENTION = [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)]
LONGER = [(2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 6)]
BIG = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
CASES: dict[str, tuple] = {
    "rms_norm": (
        "npu_rms_norm",
        [(2, 6, 8), (8,)],
        lambda x, g: npu.npu_rms_norm(x, g, 1e-5)[0],
        lambda x, g: F.rms_norm(x, (8,), g, 1e-5),
    ),
    "rms_norm_of_two_dims": (
        "npu_rms_norm",
        [(3, 2, 4), (2, 4)],
        lambda x, g: npu.npu_rms_norm(x, g, 1e-5)[0],
        lambda x, g: F.rms_norm(x, (2, 4), g, 1e-5),
    ),
    "swiglu": (
        "npu_swiglu",
        [(3, 5, 8)],
        lambda *given: npu.npu_swiglu(*given),
        lambda x: F.silu(x[..., :4]) * x[..., 4:],
    ),
    "swiglu_of_the_first_dim": (
        "npu_swiglu",
        [(4, 3)],
        lambda x: npu.npu_swiglu(x, dim=0),
        lambda x: F.silu(x[:2]) * x[2:],
    ),
    "rotary_half": (
        "npu_rotary_mul",
        [(2, 5, 3, 8), (1, 5, 1, 8), (1, 5, 1, 8)],
        lambda *given: npu.npu_rotary_mul(*given),
        lambda x, c, s: x * c + rotated_half(x) * s,
    ),
    "rotary_half_of_each_sequence": (
        "npu_rotary_mul",
        [(2, 5, 3, 8), (2, 5, 1, 8), (2, 5, 1, 8)],
        lambda *given: npu.npu_rotary_mul(*given),
        lambda x, c, s: x * c + rotated_half(x) * s,
    ),
    "rotary_pairs": (
        "npu_rotary_mul",
        [(2, 3, 5, 8), (1, 1, 5, 8), (1, 1, 5, 8)],
        lambda x, c, s: npu.npu_rotary_mul(x, c, s, "interleave"),
        lambda x, c, s: x * c + rotated_pairs(x) * s,
    ),
    "rotary_of_rows": (
        "npu_rotary_mul",
        [(7, 3, 8), (7, 1, 8), (7, 1, 8)],
        lambda *given: npu.npu_rotary_mul(*given),
        lambda x, c, s: x * c + rotated_half(x) * s,
    ),
    "permute": ("npu_moe_token_permute", [(4, 6), (4, 2)], there_and_back, plain_there_and_back),
    "permute_that_drops": (
        "npu_moe_token_permute_grad_v2",
        [(4, 6), (4, 2)],
        lambda x, p: there_and_back(x, p, KEPT),
        lambda x, p: plain_there_and_back(x, p, KEPT),
    ),
    "unpermute": ("npu_moe_token_unpermute_grad_v2", [(4, 6), (4, 2)], there_and_back, plain_there_and_back),
    "attention": ("npu_fusion_attention", ATTENTION, attention("BSND"), plain_attention),
    "attention_with_a_mask": (
        "npu_fusion_attention",
        ATTENTION,
        attention("BSND", atten_mask=triangle(5, 5)),
        lambda q, k, v: plain_attention(q, k, v, triangle(5, 5)),
    ),
    "attention_with_the_triangle_left_up": (
        "npu_fusion_attention_grad",
        ATTENTION,
        attention("BSND", atten_mask=BIG, sparse_mode=2),
        lambda q, k, v: plain_attention(q, k, v, triangle(5, 5)),
    ),
    "attention_with_the_triangle_right_down": (
        "npu_fusion_attention",
        LONGER,
        attention("BSND", atten_mask=BIG, sparse_mode=3),
        lambda q, k, v: plain_attention(q, k, v, triangle(3, 5, 2)),
    ),
    "attention_by_heads": (
        "npu_fusion_attention",
        ATTENTION,
        lambda q, k, v: attention("BNSD")(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2),
        plain_attention,
    ),
    "attention_flat": (
        "npu_fusion_attention",
        ATTENTION,
        lambda q, k, v: attention("BSH")(*map(heads_last, (q, k, v))),
        lambda q, k, v: heads_last(plain_attention(q, k, v)),
    ),
    "attention_flat_by_sequence": (
        "npu_fusion_attention",
        ATTENTION,
        lambda q, k, v: attention("SBH")(*(heads_last(x).transpose(0, 1) for x in (q, k, v))).transpose(0, 1),
        lambda q, k, v: heads_last(plain_attention(q, k, v)),
    ),
    "top_k_of_sigmoids": (
        "npu_moe_gating_top_k_backward",
        [(6, 8)],
        lambda x: npu.npu_moe_gating_top_k(x, 3, norm_type=1, out_flag=True, routed_scaling_factor=2.5)[0],
        lambda x: (top := x.sigmoid().topk(3).values) / top.sum(-1, keepdim=True) * 2.5,
    ),
    "top_k_of_softmax": (
        "npu_moe_gating_top_k_backward",
        [(6, 8)],
        lambda x: npu.npu_moe_gating_top_k(x, 3, norm_type=0, out_flag=True)[0],
        lambda x: x.softmax(-1).topk(3).values,
    ),
    "scaled_dot_product_attention": (
        "aten::scaled_dot_product_attention",
        [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)],
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ),
    **{
        f"matmul_{len(a)}_{len(b)}": ("aten::matmul_backward", [a, b], torch.matmul, torch.matmul)
        for a, b in (
            ((3, 4, 5), (5, 2)),
            ((2, 3, 4, 5), (2, 1, 5, 2)),
            ((5,), (5, 2)),
            ((4, 5), (5,)),
            ((5,), (5,)),
            ((2, 4, 5), (5,)),
            ((5,), (2, 5, 3)),
        )
    },
}


def forward_and_gradients(function, values, device):
    """What the function gives on the device, and the gradient of each value; nothing leaves the device."""
    leaves = [value.to(device).requires_grad_() for value in values]
    out = function(*leaves)
    weight = torch.arange(1.0, out.numel() + 1).cos().view(out.shape).to(device, out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]
