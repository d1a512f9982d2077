"""The emulated fused operators against PyTorch's own, forward and every gradient, through torch_npu's autograd."""

import pytest
import torch

from tests.npu.cases import CASES, CHOSEN_TK, COUNTS_E, forward_and_gradients
from tests.npu.emulation import calls

npu = torch.ops.npu


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_plain_pytorch(case):
    operator, shapes, fused, plain = case
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    name = operator if "::" in operator else f"npu::{operator}"
    before = calls[name]
    found = [x.cpu() for x in forward_and_gradients(fused, values, "npu")]
    wanted = forward_and_gradients(plain, values, "cpu")
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
    torch.testing.assert_close(w_EDF[:3].cpu(), torch.stack([x.t() @ g for x, g in parts])[:3])
    assert w_EDF[3].isnan().all()  # nothing may rely on zeros there


def test_grouped_matmul_has_no_derivative():
    """Why an adapter needs a derivative of its own: backward succeeds and leaves no gradient."""
    x, w = torch.ones(4, 2).npu().requires_grad_(), torch.ones(2, 2, 3).npu().requires_grad_()
    groups = torch.tensor([2, 2]).npu()
    (y,) = npu.npu_grouped_matmul([x], [w], group_list=groups, split_item=3, group_type=0, group_list_type=1)
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
