"""Triton's kernels without a GPU: their results in its interpreter, and what its compiler makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")

ACTIVATIONS = ("swiglu", "gelu")
PASSES = (
    *("gather", "combine", "clear_rows", "clear_unused", "tiles"),
    *(f"{kernel} {activation}" for kernel in ("activate", "activate_backward") for activation in ACTIVATIONS),
)
PER_ROW = (
    *(f"{kernel} {width}" for kernel in ("norm", "norm_backward") for width in compiled.WIDTHS),
    *("rope 64", "rope 512"),
)
PRODUCTS = (
    *(f"{kernel} {activation}" for kernel in ("up", "down_backward") for activation in ACTIVATIONS),
    *("down", "rows of x", "gradient of w_out", "gradient of w_in"),
)
FEW = ("gather", "combine", "activate_backward swiglu", "tiles")
"""What an ordinary test run compiles."""
MORE = tuple(name for name in (*PASSES, *PRODUCTS, *PER_ROW) if name not in FEW)
MOST_SHARED = 227 * 1024
"""Bytes of a block on compute capability 9.0."""


def interpret(folder, names):
    """What is wrong with each case, by name."""
    file = folder / "found.json"
    subprocess.run(
        [sys.executable, "-m", "tests.cuda.interpreted", str(file), *names],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=280,
    )
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One process for all of them, since most of its time is that of its imports."""
    return interpret(tmp_path_factory.mktemp("interpreted"), interpreted.FEW)


@pytest.mark.parametrize("case", interpreted.FEW)
def test_in_the_interpreter_values_and_gradients_are_those_of_the_composition(found, case):
    assert found[case] is None


@pytest.mark.slow
@pytest.mark.parametrize("form", ["grouped_mm_triton", "mixed", "triton"])
def test_all_loads_activations_and_types_in_the_interpreter(tmp_path, form):
    names = [case for case in interpreted.CASES if case.startswith(f"{form} ")]
    assert {name: fault for name, fault in interpret(tmp_path, names).items() if fault} == {}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A folder of its own for what Triton compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_kernel_compiles_for_hopper_without_spilling(cache, name):
    built = compiled.compiled(*compiled.kernels()[name])
    assert built.spilled == 0
    assert built.shared <= MOST_SHARED
    if name in PRODUCTS:
        assert "wgmma" in built.ptx


def test_every_kernel_is_compiled():
    assert {*PASSES, *PRODUCTS, *PER_ROW} == set(compiled.kernels())
