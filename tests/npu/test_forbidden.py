"""What the documentation forbids is refused by the emulation, and by none of torch_npu's own meta kernels."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.npu.emulation.fused.rules import NotEmulatedError, RefusedError
from tests.npu.forbidden import FORBIDDEN, grouped


@pytest.mark.parametrize("call", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_emulation_refuses(call):
    with pytest.raises(RefusedError, match="forbidden: "):
        call()


@pytest.mark.parametrize("call", FORBIDDEN.values(), ids=FORBIDDEN)
def test_torch_npu_lets_it_pass(call):
    """Why an adapter checks what it passes on: on the device, nothing says what was wrong."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call()


def test_what_is_allowed_and_not_emulated_says_so():
    x = torch.ones(2, 2, device="npu")
    with pytest.raises(NotEmulatedError, match="several x or weights"):
        torch.ops.npu.npu_grouped_matmul([x, x], [x, x], split_item=0, group_type=-1)
    with pytest.raises(NotEmulatedError, match="bias"):
        grouped(bias=[x])
