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
    for form, dtypes in (("grouped_mm_triton", ("float32", "bfloat16")), ("triton", ("float32", "float16")))
    for load in LOADS
    for activation in ("swiglu", "gelu")
    for dtype in dtypes
    for of in ("tokens", "rows")
)
FEW = (
    "grouped_mm_triton dropped swiglu bfloat16 tokens",
    "grouped_mm_triton dropped gelu float32 rows",
    "triton dropped swiglu float32 tokens",
    "triton empty gelu float16 rows",
)
"""What an ordinary test run computes."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5, "float16": 2**-8}


def problem(case):
    """What is wrong with a case."""
    import torch

    from tests.cuda import cases

    form, load, activation, name, of = case.split()
    dtype = getattr(torch, name)
    what = cases.Load(*LOADS[load])
    if of == "tokens":
        found, expected = cases.fused(what, activation, dtype, form), cases.composed(what, activation, dtype)
    else:
        found, expected = cases.rows_fused(what, activation, dtype, form), cases.rows_composed(what, activation, dtype)
    return cases.wrong(found, expected, TOLERANCE[name])


def shrink():
    """Tiles so small that these loads have several in each dimension."""
    from moeport.backends.torch.cuda.triton import products

    tile = products.Blocks(16, 16, 16, 4, 1)
    products.UP = products.ROWS = products.DOWN_BACKWARD = products.WEIGHTS = tile
    products.GROUP = 2


def main(file, *names):
    shrink()
    Path(file).write_text(json.dumps({name: problem(name) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
