"""The emulated fused operators against PyTorch's own, forward and every gradient, through torch_npu's autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from tests.npu.emulation import calls

npu = torch.ops.npu


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
CASES = {
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
        npu.npu_swiglu,
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
        npu.npu_rotary_mul,
        lambda x, c, s: x * c + rotated_half(x) * s,
    ),
    "rotary_half_of_each_sequence": (
        "npu_rotary_mul",
        [(2, 5, 3, 8), (2, 5, 1, 8), (2, 5, 1, 8)],
        npu.npu_rotary_mul,
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
        npu.npu_rotary_mul,
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
    leaves = [value.to(device).requires_grad_() for value in values]
    out = function(*leaves)
    weight = torch.arange(1.0, out.numel() + 1).cos().view(out.shape).to(device, out.dtype)
    (out * weight).sum().backward()
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_plain_pytorch(case):
    operator, shapes, fused, plain = case
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    name = operator if "::" in operator else f"npu::{operator}"
    before = calls[name]
    found, wanted = forward_and_gradients(fused, values, "npu"), forward_and_gradients(plain, values, "cpu")
    assert calls[name] > before
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sums", "counts"])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_multiplies_the_rows_of_each_group(kind, transposed):
    x_RD, w_EDF = torch.randn(8, 6), torch.randn(4, 6, 5)
    w_there = w_EDF.mT.contiguous().npu().mT if transposed else w_EDF.npu()
    groups = COUNTS_E.cumsum(0) if kind == "sums" else COUNTS_E
    options = {"group_list": groups.npu(), "group_list_type": int(kind == "counts"), "split_item": 3}
    (y_RF,) = npu.npu_grouped_matmul([x_RD.npu()], [w_there], group_type=0, **options)
    wanted = torch.cat([rows @ w for rows, w in zip(x_RD.split(COUNTS_E.tolist()), w_EDF, strict=True)])
    torch.testing.assert_close(y_RF.cpu(), wanted)


@pytest.mark.parametrize("kind", ["sums", "counts"])
def test_grouped_matmul_sums_over_each_group(kind):
    x_RD, g_RF = torch.randn(8, 6), torch.randn(8, 5)
    groups = COUNTS_E.cumsum(0) if kind == "sums" else COUNTS_E
    options = {"group_list": groups.npu(), "group_list_type": int(kind == "counts"), "split_item": 3}
    (w_EDF,) = npu.npu_grouped_matmul([x_RD.npu().t()], [g_RF.npu()], group_type=2, **options)
    parts = zip(x_RD.split(COUNTS_E.tolist()), g_RF.split(COUNTS_E.tolist()), strict=True)
    torch.testing.assert_close(w_EDF.cpu(), torch.stack([x.t() @ g for x, g in parts]))
    assert w_EDF[3].cpu().eq(0).all()


def test_grouped_matmul_has_no_derivative():
    """Why an adapter needs a derivative of its own: backward leaves no gradient."""
    x, w = torch.ones(4, 2).npu().requires_grad_(), torch.ones(2, 2, 3).npu().requires_grad_()
    groups = torch.tensor([2, 2]).npu()
    (y,) = npu.npu_grouped_matmul([x], [w], group_list=groups, split_item=3, group_type=0, group_list_type=1)
    with contextlib.suppress(RuntimeError):
        y.sum().backward()
    assert x.grad is None
    assert w.grad is None


def test_the_inverse_permutation_is_what_permute_returns():
    x = torch.arange(4.0).unsqueeze(1)
    rows, places = npu.npu_moe_token_permute(x.npu(), CHOSEN_TK.npu())
    assert rows.flatten().tolist() == [0, 2, 3, 1, 3, 0, 1, 2]
    assert places.dtype == torch.int32
    assert places.view(4, 2).tolist() == [[0, 5], [3, 6], [7, 1], [2, 4]]


def test_gating_of_softmax():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, 5.0, 4.0]])
    weight, expert, row = npu.npu_moe_gating_top_k_softmax(x.npu(), k=2)
    assert expert.tolist() == [[1, 2], [2, 3]]  # the first of equal ones
    assert row.tolist() == [[0, 2], [1, 3]]
    torch.testing.assert_close(weight.cpu(), x.softmax(-1).gather(1, expert.cpu().long()))


def test_gating_of_groups_with_a_bias():
    x = torch.tensor([[0.0, 1.0, 2.0, 9.0, 0.0, 0.0]])
    bias = torch.tensor([5.0, 5.0, 5.0, 0.0, 0.0, 0.0])
    weight, expert, _ = npu.npu_moe_gating_top_k(x.npu(), 2, bias=bias.npu(), group_count=2, k_group=1, norm_type=1)
    assert expert.tolist() == [[2, 1]]
    wanted = x.sigmoid()[:, [2, 1]]  # the bias chooses and does not weigh
    torch.testing.assert_close(weight.cpu(), wanted / wanted.sum())


def test_fused_adamw_is_that_of_the_cpu():
    def trained(device):
        torch.manual_seed(0)
        p = torch.randn(6).to(device).requires_grad_()
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
        for _ in range(3):
            (p * p.detach().sin()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return p.detach().cpu()

    before = calls["aten::_fused_adamw_"]
    torch.testing.assert_close(trained("npu"), trained("cpu"))
    assert calls["aten::_fused_adamw_"] == before + 3
