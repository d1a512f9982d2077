"""The stand-in for CANN under the real torch_npu: devices answer, memory works, and what nothing emulates raises."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tests.npu.emulation import calls


def test_torch_finds_the_device_by_itself():
    assert torch.accelerator.current_accelerator().type == "npu"
    assert torch.accelerator.device_count() == torch.npu.device_count() == 2
    assert torch.npu.get_device_name(0) == "Ascend910B2"
    assert dist.get_default_backend_for_device("npu") == "hccl"


def test_memory_goes_there_and_back():
    x = torch.arange(12.0).view(3, 4)
    moved = x.npu()[1:, ::2]
    assert moved.device.type == "npu"
    assert moved.cpu().tolist() == [[4, 6], [8, 10]]
    assert moved.to(torch.bfloat16).cpu().dtype == torch.bfloat16


def test_a_view_shares_the_memory():
    x = torch.zeros(4).npu()
    x[1:3].add_(1)
    assert x.tolist() == [0, 1, 1, 0]


def test_streams_and_events_answer():
    first, second = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    with torch.npu.stream(torch.npu.Stream()):
        first.record()
        second.record()
    torch.accelerator.synchronize()
    assert first.query()
    assert first.elapsed_time(second) == pytest.approx(0.1)  # whatever happened between them


def test_memory_is_counted():
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, device="npu")
    assert torch.npu.max_memory_allocated() - before >= x.numel() * 4


def test_what_runs_is_counted():
    before = calls["aten::mm"]
    torch.mm(torch.ones(2, 3).npu(), torch.ones(3, 2).npu())
    assert calls["aten::mm"] == before + 1


def test_a_fused_operator_that_nothing_emulates_raises():
    with pytest.raises(RuntimeError, match="507899"):
        torch.ops.npu.npu_fast_gelu(torch.ones(2, 8).npu())


def test_an_operator_without_a_kernel_of_the_device_raises():
    with pytest.raises(RuntimeError, match="TORCH_NPU_FALLBACK_CPU_DISABLE"):
        torch.histogram(torch.ones(4).npu(), 2)


def test_without_the_emulation_every_operator_raises():
    program = """
import sys
from tests.npu.standin import start
sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, start.WithKernels)]
import torch
x = torch.ones(4).npu()
for operation in (lambda: x + x, lambda: x @ x, lambda: x.sort(), lambda: torch.ops.npu.npu_swiglu(x)):
    try:
        operation().cpu()
    except RuntimeError as error:
        assert "507899" in str(error) or "libopapi.so not found" in str(error), error
    else:
        raise SystemExit("an operator without a kernel gave a result")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_the_variable_torch_npu_finds_no_cann():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MOEPORT_FAKE", "ASCEND"))}
    done = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, timeout=120)
    assert b"libhccl.so" in done.stderr
