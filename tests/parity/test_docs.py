"""The table of limits in the documentation is the one in the code."""

from pathlib import Path

import pytest

from moeport.parity.thresholds import LIMITS, RATIO_MAX, RATIO_MEAN, RATIO_RMS

TEXT = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
TABLE = [[cell.strip() for cell in line.split("|")] for line in TEXT.splitlines() if line.startswith("|")]
ROWS = {row[1]: row[2:6] for row in TABLE}
COLUMNS = ("float64", "float32", "float16", "bfloat16")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("unit roundoff u", "unit"),
        ("activations, scores", "forward"),
        ("losses", "loss"),
        ("gradients", "gradient"),
        ("moments, second step", "moment"),
        ("updates", "update"),
        ("loss at a step", "trajectory"),
        ("gradient norm at a step", "norm"),
        ("cosine, at least", "cosine"),
        ("ULP of an isolated operation", "isolated_ulp"),
    ],
)
def test_limits(row, field):
    for shown, dtype in zip(ROWS[row], COLUMNS, strict=True):
        assert float(shown) == pytest.approx(getattr(LIMITS[dtype], field), rel=0.05)


def test_the_thousandth_rule():
    shares = {"0.1%": 0.001, "\N{EN DASH}": None}
    assert [shares[cell] for cell in ROWS["entries off by a thousandth"]] == [LIMITS[d].thousandth for d in COLUMNS]


def test_ratios_of_the_double_benchmark():
    assert (RATIO_RMS, RATIO_MEAN, RATIO_MAX) == (2, 2, 10)
    rule = "up to 2 times as far by RMS and by mean relative error and 10 times by the largest"
    assert rule in " ".join(TEXT.split())
