"""The real meta kernels and derivatives of torch_npu give the shapes and types that the emulation gives."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.npu.cases import CASES, forward_and_gradients

WITHOUT_META = ("npu_moe_gating_top_k_backward",)
"""Operators of derivatives for which torch_npu has no meta kernel."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] not in WITHOUT_META])
def test_shapes_and_types_agree(name, dtype):
    _, shapes, fused, _ = CASES[name]
    values = [torch.ones(shape, dtype=dtype) for shape in shapes]
    wanted = described(forward_and_gradients(fused, values, "npu"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert described(forward_and_gradients(fused, map(mode.from_tensor, values), "npu")) == wanted
    assert all(device == "npu" for _, _, device in wanted)


@pytest.mark.parametrize("operator", WITHOUT_META)
def test_those_without_a_meta_kernel_have_none_yet(operator):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"npu::{operator}", "PrivateUse1")
    assert not has(f"npu::{operator}", "Meta")


def described(tensors):
    return [(tuple(x.shape), x.dtype, x.device.type) for x in tensors]
