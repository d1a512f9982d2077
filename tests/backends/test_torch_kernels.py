"""What the conformance suite cannot see of PyTorch's kernels: block sizes, scaling and when gradients are computed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeport.backends.torch.kernels import LinearCrossEntropy
from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import Ops
from tests.support import assert_close, grid, rng

OPS = TorchOps(torch.device("cpu"))
TARGETS = torch.tensor(rng(3).integers(0, 5, 7))


def inputs(dtype=torch.float64, weight_dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
    x_TD, weight_VD = torch.tensor(grid(1, 7, 4), dtype=dtype), torch.tensor(grid(2, 5, 4), dtype=weight_dtype or dtype)
    return x_TD.requires_grad_(), weight_VD.requires_grad_()


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("block_rows", [1, 2, 3, 6, 7, 100])
def test_output_loss_does_not_depend_on_the_block(block_rows, share):
    got, want = inputs(), inputs()
    *losses, nll_T = LinearCrossEntropy.apply(*got, TARGETS, 0.25, block_rows)
    assert_close(nll_T, Ops.linear_cross_entropy_by_token(OPS, *want, TARGETS, 0.25)[1], 1e-14)
    expected: tuple[torch.Tensor, ...] = Ops.linear_cross_entropy(OPS, *want, TARGETS, 0.25)
    (losses[0] * share).backward()
    (expected[0] * share).backward()
    for x, y in zip(losses, expected, strict=True):
        assert_close(x.item(), y.item(), 1e-14)
    for x, y in zip(got, want, strict=True):
        assert_close(x.grad, y.grad, 1e-14)


@pytest.mark.parametrize("wanted", [0, 1])
def test_output_loss_by_one_argument_alone(wanted):
    arguments, both = inputs(), inputs()
    arguments[1 - wanted].requires_grad_(False)
    for x in (arguments, both):
        OPS.linear_cross_entropy(*x, TARGETS, 0.0)[0].backward()
    assert arguments[wanted].grad.tolist() == both[wanted].grad.tolist()
    assert arguments[1 - wanted].grad is None


def test_output_loss_scales_bfloat16_gradients_by_exact_shares():
    """A third rounded to bfloat16 would be 0.2 % too large in every element alike."""
    gradients = []
    for share in (1.0, 1 / 3):
        x_TD = torch.tensor(grid(4, 1, 64), dtype=torch.bfloat16, requires_grad=True)
        weight_VD = torch.tensor(grid(5, 5, 64), dtype=torch.float32)
        (OPS.linear_cross_entropy(x_TD, weight_VD, TARGETS[:1], 0.0)[0] * share).backward()
        gradients.append(x_TD.grad)
    whole, third = gradients
    assert third.tolist() == (whole.float() / 3).to(torch.bfloat16).tolist()


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("gradients", "products"), [(True, 3), (False, 1)])
def test_evaluation_computes_no_gradients(gradients, products):
    with torch.set_grad_enabled(gradients), CountProducts() as mode:
        OPS.linear_cross_entropy(*inputs(), TARGETS, 0.0)
    assert mode.count == products
