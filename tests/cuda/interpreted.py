"""Triton's kernels in its interpreter: `python -m tests.cuda.interpreted FILE CASE...` in a process with
TRITON_INTERPRET=1, which must be set before Triton is imported. Writes what is wrong with each case, or null, as JSON.

The interpreter computes tl.dot of bfloat16 on the bits as integers, so products in half precision run in float16.
"""

import json
import sys
from pathlib import Path

LOADS = {
    "uniform": (5, 2, 3, 24, 40, "uniform"),
    "dropped": (6, 2, 3, 8, 24, "dropped"),
    "empty": (4, 3, 5, 16, 8, "last two empty"),
    "one": (9, 2, 3, 8, 24, "one"),
    "single": (1, 1, 1, 8, 16, "uniform"),
}
CASES = tuple(
    f"{form} {load} {activation} {dtype} {of}"
    for form, dtypes in (
        ("grouped_mm_triton", ("float32", "bfloat16")),
        ("mixed", ("float32",)),
        ("triton", ("float32", "float16")),
    )
    for load in LOADS
    for activation in ("swiglu", "gelu")
    for dtype in dtypes
    for of in ("tokens", "rows")
)
NORMS = {"norm": (3, 5, 64), "norm-odd": (2, 3, 4, 40), "norm-parts": (137, 256), "norm-wide": (3, 5000)}
ROPES = {
    "rope": (2, 5, 3, 16),
    "rope-odd": (1, 3, 5, 40),
    "rope-many": (1, 2, 70, 62),
    "rope-one": (2, 6, 1, 16),
    "rope-each": (2, 3, 5, 40),
}
"""One head is what keys with a rotary base of their own have. The angles of the last differ between sequences."""
PER_ROW = tuple(f"{case} {dtype}" for case in (*NORMS, *ROPES) for dtype in ("float32", "bfloat16"))
FEW = (
    "grouped_mm_triton dropped swiglu bfloat16 tokens",
    "grouped_mm_triton dropped gelu float32 rows",
    "mixed empty swiglu float32 tokens",
    "triton dropped swiglu float32 tokens",
    "triton empty gelu float16 rows",
    *PER_ROW,
)
"""What an ordinary test run computes."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5, "float16": 2**-8}


def problem(case):
    """What is wrong with a case."""
    import torch

    from tests.cuda import cases

    if case in PER_ROW:
        return per_row(*case.split())
    form, load, activation, name, of = case.split()
    dtype = getattr(torch, name)
    what = cases.Load(*LOADS[load])
    if of == "tokens":
        found, expected = cases.fused(what, activation, dtype, form), cases.composed(what, activation, dtype)
    else:
        found, expected = cases.rows_fused(what, activation, dtype, form), cases.rows_composed(what, activation, dtype)
    return cases.wrong(found, expected, TOLERANCE[name])


def per_row(case, name):
    """What is wrong with RMSNorm or rope, value and gradients, on a strided input."""
    import torch

    from moeport.backends.torch.cuda import norm_rope
    from moeport.core.ops import Ops
    from tests.cuda import cases

    shape, dtype = (NORMS | ROPES)[case], getattr(torch, name)
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    sequences = shape[:1] if case == "rope-each" else ()
    angle = torch.randn(*sequences, shape[1], shape[-1] // 2).repeat(*(1 for _ in sequences), 1, 2)
    rest = (torch.randn(shape[-1]) + 1, 1e-5) if case in NORMS else (angle.cos(), angle.sin())
    kernel, differentiated = ("rms_norm", 2) if case in NORMS else ("rope", 1)
    found, expected = [], []
    for form, results in ((getattr(norm_rope, kernel), found), (getattr(Ops, kernel), expected)):
        leaves = [each.clone().requires_grad_() for each in (x, *rest)[:differentiated]]
        y = form(cases.CPU, *leaves, *(x, *rest)[differentiated:])
        results += [y, *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel())).view_as(y).to(dtype))]
    return cases.wrong(found, expected, {"float32": 1e-6, "bfloat16": 2**-7}[name])


def shrink():
    """Tiles so small that these loads have several in each dimension."""
    from moeport.backends.torch.cuda.triton import products, rms_norm

    rms_norm.PARTS = 3
    tile = products.Blocks(16, 16, 16, 4, 1)
    products.UP = products.ROWS = products.DOWN_BACKWARD = products.WEIGHTS = tile
    products.GROUP = 2


def main(file, *names):
    shrink()
    Path(file).write_text(json.dumps({name: problem(name) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
