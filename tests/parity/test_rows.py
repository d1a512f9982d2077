"""Single rows that are wrong, among many that are right."""

import numpy as np
import pytest

from moeport.parity.compare import compare
from moeport.parity.recording import Recording, TensorRecord
from tests.support import rng


def side(values, dtype):
    record = TensorRecord("x:permute", "activation", dtype, values.shape, op="permute", values=values)
    return Recording(dtype, dtype, {record.name: record})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [lambda row: 0 * row, lambda row: row[::-1], lambda row: -row])
def test_one_row_of_many(dtype, fault):
    a = rng().standard_normal((4096, 8)).astype(np.float32)
    b = a.copy()
    b[77] = fault(b[77])
    found = compare(side(a, dtype), side(b, dtype))
    assert found.headline.startswith("FAIL x:permute"), found.headline
    assert dtype == "float32" or "row 77 of 4096 is off by " in found.headline


def test_rounding_of_small_rows_is_no_fault():
    a = rng().standard_normal((4096, 8)).astype(np.float32)
    a[::7] *= 1e-3
    a[5] = 0
    b = (a + 0.03 * rng(1).standard_normal(a.shape)).astype(np.float32)
    assert compare(side(a, "bfloat16"), side(b, "bfloat16")).verdict == "pass"
