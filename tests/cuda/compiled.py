"""Compile Triton's kernels for a GPU that need not be there, and read what the assembler says of them."""

import os
import re
import subprocess
from dataclasses import dataclass
from typing import Any

WIDTH, HIDDEN, EXPERTS, CHOICES = 2048, 768, 128, 8
"""Those of Qwen3-MoE."""


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel."""

    spilled: int
    """Bytes that registers did not hold."""
    registers: int
    shared: int
    """Bytes of shared memory."""
    ptx: str


def compiled(kernel, constants, warps=4, stages=3, capability=90):
    """Compile a kernel whose other arguments are pointers, of the types in TYPES, or 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
    }
    built = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    ptx = built.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]
    said = subprocess.run(
        [get_ptxas(capability).path, "-v", f"--gpu-name={target}", "-", "-o", os.devnull],
        input=ptx,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    spilled, registers = re.search(r"(\d+) bytes spill stores", said), re.search(r"Used (\d+) registers", said)
    return Compiled(int(spilled[1]), int(registers[1]), built.metadata.shared, ptx)


WIDTHS = (64, 128, 1024, 8192)
TYPES = {
    **dict.fromkeys(("a", "b", "x", "w", "y", "h", "out", "hidden", "activated", "grad", "scaled"), "*bf16"),
    **dict.fromkeys(("grad_hidden", "grad_h"), "*bf16"),
    **dict.fromkeys(("gate", "grad_gate", "partial"), "*fp32"),
    **dict.fromkeys(("order", "position"), "*i64"),
    **dict.fromkeys(("ends", "table", "tiles", "total", "ranked"), "*i32"),
    **dict.fromkeys(("R", "E", "rows", "size"), "i32"),
    **dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*bf16"),
    **dict.fromkeys(("weight_ptr", "rstd_ptr", "part_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
    **dict.fromkeys(("eps", "sign"), "fp32"),
    **dict.fromkeys(("num_rows", "num_tiles", "period"), "i32"),
}


def kernels():
    """(kernel, constants, warps, stages) of everything that a layer launches, by name."""
    from moeport.backends.torch.cuda.triton import passes, products, tiles

    found: dict[str, tuple[Any, ...]] = {}
    rows = {"E": EXPERTS, "D": WIDTH, "K": CHOICES, "BLOCK": 1024}
    found["gather"] = passes.gather_kernel, {"D": WIDTH, "K": CHOICES, "BLOCK": 2048}, 4, 3
    found["combine"] = passes.combine_kernel, {**rows, "WEIGHTED": True, "WHOLE": False}, 4, 3
    found["clear_rows"] = passes.clear_rows_kernel, {"E": EXPERTS, "D": WIDTH, "BLOCK": 2048}, 4, 3
    found["clear_unused"] = passes.clear_unused_kernel, {"BLOCK": 2048}, 4, 3
    found["tiles"] = tiles.table_kernel, {"E": EXPERTS, "BM": 128, "BLOCK": 128}, 4, 3
    for gated in (True, False):
        name, shape = "swiglu" if gated else "gelu", {"F": HIDDEN, "GATED": gated}
        found[f"activate {name}"] = passes.activate_kernel, {**shape, "BLOCK": 1024}, 4, 3
        options = {"E": EXPERTS, "WEIGHTED": True, "WHOLE": False, "BLOCK": 1024}
        found[f"activate_backward {name}"] = passes.activate_backward_kernel, {**shape, **options}, 4, 3
        gathered = {**shape, "D": WIDTH, "CHOICES": CHOICES}
        found[f"up {name}"] = products.up_kernel, gathered, products.UP
        found[f"down_backward {name}"] = (
            products.down_backward_kernel,
            {**gathered, "WEIGHTED": True},
            products.DOWN_BACKWARD,
        )
    down = {"N": WIDTH, "K": HIDDEN, "STRIDE_N": HIDDEN, "STRIDE_K": 1}
    up_backward = {"N": WIDTH, "K": 2 * HIDDEN, "STRIDE_N": 1, "STRIDE_K": WIDTH}
    w_out = {"M": WIDTH, "N": HIDDEN, "A_CHOICES": CHOICES, "B_CHOICES": 0}
    w_in = {"M": 2 * HIDDEN, "N": WIDTH, "A_CHOICES": 0, "B_CHOICES": CHOICES}
    found["down"] = products.rows_kernel, down, products.ROWS
    found["rows of x"] = products.rows_kernel, up_backward, products.ROWS
    found["gradient of w_out"] = products.weights_kernel, w_out, products.WEIGHTS
    found["gradient of w_in"] = products.weights_kernel, w_in, products.WEIGHTS
    return {name: _with_blocks(*each) for name, each in found.items()} | per_row()


def per_row():
    """The same of RMSNorm and rope, from heads of a width of 64 to the widest rows."""
    from moeport.backends.torch.cuda.triton import rms_norm, rope, rows

    found: dict[str, tuple[Any, ...]] = {}
    for width in WIDTHS:
        count = rows.rows_of_tile(width)
        sizes, warps = {"D": width, "ROWS": count, "BLOCK": width}, rows.warps(count * width)
        found[f"norm {width}"] = rms_norm.forward_kernel, sizes, warps, 3
        found[f"norm_backward {width}"] = rms_norm.backward_kernel, sizes, warps, 3
    for half, heads in ((32, 16), (256, 8)):
        sizes = {"H": heads, "HALF": half, "HEADS": min(heads, rows.rows_of_tile(half)), "BLOCK": half}
        found[f"rope {2 * half}"] = rope.rotate_kernel, sizes, rows.warps(sizes["HEADS"] * half), 3
    return found


def _with_blocks(kernel, constants, *rest):
    if len(rest) == 2:
        return (kernel, constants, *rest)
    (blocks,) = rest
    sizes = {"BM": blocks.M, "BN": blocks.N, "BK": blocks.K, "GROUP": 8}
    return kernel, {**constants, **sizes}, blocks.warps, blocks.stages
