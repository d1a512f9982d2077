"""Metrics against independent formulas: numpy's own spacing, bit patterns, and numbers worked out by hand."""

import numpy as np
import pytest

from moeport.parity.hints import hint
from moeport.parity.metrics import histogram, measure, relative_rms, same_non_finite, ulp, ulp_distance
from moeport.parity.thresholds import LIMITS
from tests.support import rng

VALUES = np.array([1.0, 1.5, -2.0, 3.14159, 1e-30, -1e30, 65504.0, 2.0**-126, 0.1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ulp_is_numpys_spacing(dtype):
    x = np.concatenate([VALUES, rng(1).standard_normal(500) * 10.0 ** rng(2).integers(-30, 30, 500)]).astype(dtype)
    np.testing.assert_array_equal(ulp(x, dtype), np.abs(np.spacing(x)).astype(np.float64))


def test_ulp_of_float16_is_numpys_spacing():
    x = np.array([1.0, -3.0, 0.001, 6e-8, 6e-5, 1000.0], np.float16)
    np.testing.assert_array_equal(ulp(x, "float16"), np.abs(np.spacing(x)).astype(np.float64))


def test_ulp_of_bfloat16_is_the_distance_to_the_next_bit_pattern():
    bits = rng(3).integers(0x0080, 0x7F00, 300).astype(np.uint32)
    value, following = (((bits + step) << 16).view(np.float32).astype(np.float64) for step in (0, 1))
    np.testing.assert_array_equal(ulp(value, "bfloat16"), following - value)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neighbours_are_one_ulp_apart(dtype):
    x = VALUES.astype(dtype)
    for toward in (np.inf, -np.inf):
        distance = ulp_distance(x, np.nextafter(x, np.array(toward, dtype)), dtype)
        assert ((distance == 1) | (distance == 0.5)).all()  # half where the neighbour is across a power of two
    smallest = np.nextafter(np.zeros(1, dtype), np.ones(1, dtype))
    assert ulp_distance(-smallest, smallest, dtype).tolist() == [2]  # zero is between them
    assert ulp_distance(np.array([0.0]), np.array([-0.0]), dtype).tolist() == [0]


def test_every_number_by_its_formula():
    a, b = rng(4).standard_normal((5, 7)), rng(5).standard_normal((5, 7))
    found = measure(a, b, "float64")
    error = np.abs(b - a)
    assert found.relative_rms == pytest.approx(np.sqrt((error**2).sum() / (a**2).sum()))
    assert (found.max_abs, found.mean_abs) == pytest.approx((error.max(), error.mean()))
    large = np.abs(a) > 1e-2 * np.sqrt((a**2).mean())
    relative = (error / np.abs(a))[large]
    assert (found.max_relative, found.mean_relative) == pytest.approx((relative.max(), relative.mean()))
    assert found.cosine == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    assert found.over_thousandth == pytest.approx((relative > 1e-3).mean())
    assert found.worst == np.unravel_index(error.argmax(), a.shape)
    assert not found.equal


def test_numbers_at_the_edges():
    zero, one = np.zeros(3), np.ones(3)
    assert measure(zero, zero, "float32").equal
    assert measure(zero, zero, "float32").cosine == 1
    assert relative_rms(zero, one) == np.inf
    assert relative_rms(one, zero) == 1
    assert measure(np.zeros(0), np.zeros(0), "float32").equal
    assert relative_rms(np.full(2, 1e200), np.full(2, 2e200)) == pytest.approx(1)  # squares would overflow


def test_what_is_not_finite():
    nan, inf = np.nan, np.inf
    assert same_non_finite(np.array([1, nan, inf]), np.array([2, nan, inf]))
    assert not same_non_finite(np.array([1, nan]), np.array([1, 1]))
    assert not same_non_finite(np.array([inf]), np.array([-inf]))
    found = measure(np.array([1.0, nan, inf, 2.0]), np.array([1.0, nan, inf, 3.0]), "float32")
    assert (found.max_abs, found.worst) == (1.0, (3,))


def test_a_single_entry_is_no_thousandth():
    a = np.ones(500)
    b = a.copy()
    b[0] = 1.1
    assert measure(a, b, "float32").over_thousandth == 0
    b[1] = 1.1
    assert measure(a, b, "float32").over_thousandth == 2 / 500


def test_histogram_counts_every_entry():
    a = np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    b = np.array([1.0, 1.02, 1.03, 100.0, 1e-30])
    assert histogram(a, b) == {"equal": 1, "1e-17": 1, "1e-02": 2, "1e+00": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.T, "B is A transposed"),
        (lambda x: 0.25 * x, "B is 0.25 times A"),
        (lambda x: -x, "B is -1 times A"),
        (lambda x: 1.000473 * x, "B is 1.00047 times A"),
        (lambda x: 0.99 * x, "B is 0.99 times A"),
        (lambda x: 0.9951 * x, "B is 0.9951 times A"),
        (lambda x: 0 * x, "B is zero"),
        (lambda x: x[[0, 2, 1, 3, 4, 5, 6, 7]], "rows 1, 2 of 8 differ: B has them swapped"),
        (lambda x: np.where(np.arange(8)[:, None] == 5, 0, x), "row 5 of 8 differs: B has zeros there"),
        (lambda x: np.where(np.arange(8)[:, None] == 5, 3, x), "row 5 of 8 differs"),
        (lambda x: x + rng(9).standard_normal(x.shape), None),
    ],
)
def test_hints(change, words):
    x = rng(6).standard_normal((8, 8))
    assert hint(x, change(x), 1e-5) == words


def test_a_factor_that_explains_no_difference_is_no_hint():
    """What a changed epsilon does: each row has another factor, and all together are within a wide limit."""
    x = rng(6).standard_normal((8, 8)) * np.logspace(-2, 2, 8)[:, None]
    a, b = (x / np.sqrt((x**2).mean(1, keepdims=True) + eps) for eps in (1e-6, 1e-4))
    assert hint(a, b, 0.5) is None
    assert hint(a, a, 0.5) is None


def test_digits_of_bfloat16_are_noticed():
    x = rng(7).standard_normal(100).astype(np.float32)
    short = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert hint(x, short, 1e-5) == "B has only the precision of bfloat16"


def test_limits_grow_with_the_unit_roundoff():
    assert LIMITS["float64"].unit == np.finfo(np.float64).eps / 2
    assert LIMITS["float32"].unit == np.finfo(np.float32).eps / 2
    ordered = [LIMITS[dtype] for dtype in ("float64", "float32", "float16", "bfloat16")]
    for name in ("unit", "forward", "loss", "gradient", "update", "trajectory"):
        limits = [getattr(limit, name) for limit in ordered]
        assert limits == sorted(limits)
