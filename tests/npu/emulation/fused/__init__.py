"""References of the fused operators, written from the documentation of op-plugin.

Each computes in float32 and rounds once. Each refuses what the documentation forbids, since torch_npu's meta kernels
let nearly everything pass; what the documentation allows and nothing here needs is not emulated, and says so.
"""

from tests.npu.emulation.fused import attention, gating, grouped, norm, permutation, rotary, swiglu
from tests.npu.emulation.memory import BACKEND, kernel

OPERATORS = {
    **norm.OPERATORS,
    **swiglu.OPERATORS,
    **rotary.OPERATORS,
    **attention.OPERATORS,
    **permutation.OPERATORS,
    **grouped.OPERATORS,
    **gating.OPERATORS,
}
"""By name, without `npu::`."""


def install(library):
    for name, function in OPERATORS.items():
        library.impl(f"npu::{name}", kernel(f"npu::{name}", function), BACKEND, allow_override=True)
