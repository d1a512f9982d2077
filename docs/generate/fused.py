"""The fused operators of each backend and device, from the table of facts."""

from moeport.facts import BACKENDS


def operators(backend: str, device: str) -> str:
    """A table of the fused operators of a backend on a device."""
    head = "| Kernel | Operator | Compute types | Serves |\n|---|---|---|---|"
    rows = (
        f"| `{fused.kernel}` | `{fused.name}` | {', '.join(fused.dtypes)} | {fused.limits or 'all sizes'} |"
        for fused in BACKENDS[backend].fused_on(device)
    )
    return "\n".join([head, *rows])


def torch_cpu() -> str:
    """Those of PyTorch on CPUs."""
    return operators("torch", "cpu")


def torch_cuda() -> str:
    """Those of PyTorch on NVIDIA GPUs."""
    return operators("torch", "cuda")


def torch_npu() -> str:
    """Those of torch-npu."""
    return operators("torch", "npu")


def mindspore_npu() -> str:
    """Those of MindSpore on Ascend."""
    return operators("mindspore", "npu")
