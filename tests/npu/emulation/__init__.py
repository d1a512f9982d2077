"""Kernels for torch_npu over the stand-in for CANN, computed by the CPU.

Real are torch_npu's schemas, meta kernels, autograd, streams, allocator and device functions. Not real are the
numerics, which are the CPU's, and the speed. An operator that has no kernel here raises an error.
"""

import torch

from tests.npu.emulation import aten, fused
from tests.npu.emulation.collectives import register
from tests.npu.emulation.memory import calls

__all__ = ["calls", "install"]

_libraries = []


def install():
    """Give torch_npu its kernels and `hccl` its collectives, in this process; done when torch_npu is imported."""
    for name, module in (("aten", aten), ("npu", fused)):
        library = torch.library.Library(name, "IMPL")
        _libraries.append(library)
        module.install(library)
    functional = torch.library.Library("_c10d_functional", "IMPL")
    _libraries.append(functional)
    register(functional)
