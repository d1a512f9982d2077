"""What the type checker says of the use of arrays in neutral code."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ALLOWED = """
import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops


def allowed(ops: Ops, x_TD: Array) -> Array:
    half = ops.constant_like(0.5, x_TD)
    y_TD = -x_TD + x_TD * half - x_TD / half
    index_T = ops.arange(x_TD.shape[0]) // ops.index(2) % ops.index(3)
    later = (index_T > ops.index(1), index_T >= ops.index(1), index_T < ops.index(1), index_T <= ops.index(1))
    equal_T = index_T == ops.index(1)
    return ops.where(ops.reshape(equal_T, (-1, 1)), y_TD[:, :1], y_TD[..., 1:] if later else x_TD[0])


def of_numpy(x_TD: np.ndarray, ops: Ops) -> Array:
    return allowed(ops, x_TD)
"""
REFUSED = {
    "x.sum()": '"Array" has no attribute "sum"',
    "x.dtype": '"Array" has no attribute "dtype"',
    "x.reshape(-1)": '"Array" has no attribute "reshape"',
    "x.grad": '"Array" has no attribute "grad"',
    "x.ndim": '"Array" has no attribute "ndim"',
    "x.T": '"Array" has no attribute "T"',
    "x @ x": "Unsupported left operand type for @",
    "x ** 2": "Unsupported",
    "x[x]": "Invalid index type",
    "x[[0, 1]]": "Invalid index type",
    "float(x)": 'Argument 1 to "float" has incompatible type "Array"',
    "len(x)": 'Argument 1 to "len" has incompatible type "Array"',
    "list(x)": "No overload variant",
}
"""Expressions of an array x, and what is said of them."""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Messages of mypy by line, for one file with all of it."""
    folder = tmp_path_factory.mktemp("neutral")
    lines = [f"    {expression}" for expression in REFUSED]
    text = "\n".join([ALLOWED, "", "def refused(x: Array) -> None:", *lines, ""])
    (folder / "neutral.py").write_text(text)
    root = Path(__file__).parents[2]
    options = ["--config-file", str(root / "pyproject.toml"), "--no-error-summary", "--cache-dir", str(folder)]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--follow-imports=silent", str(folder / "neutral.py")],
        cwd=root,
        capture_output=True,
        text=True,
    )
    found = {}
    for line in run.stdout.splitlines():
        place, _, message = line.partition(" error: ")
        if message:
            found[text.splitlines()[int(place.split(":")[1]) - 1].strip()] = message
    return found


@pytest.mark.parametrize("expression", REFUSED)
def test_neutral_code_may_not(said, expression):
    assert REFUSED[expression] in said.get(expression, "nothing")


def test_neutral_code_may_compute_compare_and_slice(said):
    assert said.keys() == REFUSED.keys()
