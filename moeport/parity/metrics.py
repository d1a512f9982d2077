"""How far apart two arrays are: each number with its formula.

All functions take arrays of the same shape, compute in float64, and treat `a` as the reference. Only
`same_non_finite` considers entries that are not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeport.parity.recording import STORED

MANTISSA_BITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7, **STORED}
"""Stored bits of the significand p - 1; the unit roundoff is 2^-p (IEEE 754-2019, table 3.5; bfloat16 as in float32
cut to 16 bits)."""
SMALLEST_EXPONENT = {
    **dict.fromkeys(STORED, -126),
    "float64": -1022,
    "float32": -126,
    "float16": -14,
    "bfloat16": -126,
    "float8_e4m3fn": -6,
    "float8_e4m3fnuz": -7,
    "float8_e5m2": -14,
    "float8_e5m2fnuz": -15,
}
"""Exponent of the smallest normal number (IEEE 754-2019, emin)."""
SMALL = 1e-2
"""Entries below this share of the root mean square count as small: their relative error means nothing."""


@dataclass(frozen=True)
class Metrics:
    """Distances of B from A."""

    relative_rms: float
    """sqrt(sum (b - a)^2 / sum a^2)."""
    max_abs: float
    """max |b - a|."""
    mean_abs: float
    """mean |b - a|."""
    max_relative: float
    """max |b - a| / |a| over entries that are not small."""
    mean_relative: float
    """Mean over the same entries."""
    cosine: float
    """sum a b / sqrt(sum a^2 sum b^2); 1 where both are 0."""
    max_ulp: float
    """Largest distance in units in the last place of the coarser of the two types."""
    mean_ulp: float
    """Mean distance in the same units."""
    over_thousandth: float
    """Share of the entries, small ones excepted, with |b - a| / |a| > 0.001: msprobe's thousandth rule. A single entry
    does not count."""
    equal: bool
    """Whether all bits agree."""
    worst: tuple[int, ...]
    """Index of the largest |b - a|."""


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """Unit in the last place of each entry, for a type given by name: 2^(max(e, emin) - (p - 1)), 2^e <= |x| < 2^(e+1).

    That of 0 and of subnormal numbers is the smallest subnormal number (Muller et al., Handbook of Floating-Point
    Arithmetic, 2nd ed., section 2.3.2, definition of Goldberg extended to all reals).
    """
    exponent = np.frexp(np.abs(x.astype(np.float64)))[1] - 1
    exponent = np.where(x == 0, SMALLEST_EXPONENT[dtype], np.maximum(exponent, SMALLEST_EXPONENT[dtype]))
    return np.ldexp(1.0, exponent - MANTISSA_BITS[dtype])


def ulp_distance(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    """|b - a| in units in the last place of the larger of the two in magnitude.

    In the smaller unit, the distance could double across a power of two. Signs and zeros need no special case, since
    the distance is measured on the real line.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.abs(b - a) / ulp(np.maximum(np.abs(a), np.abs(b)), dtype)


def same_non_finite(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether NaNs and infinities are at the same positions, the latter with the same signs."""
    odd = ~(np.isfinite(a) & np.isfinite(b))
    return bool(np.array_equal(a[odd], b[odd], equal_nan=True))


def relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """||b - a|| / ||a|| in the 2-norm; 0 where both are 0, infinite where only `a` is."""
    a, b = _finite(a, b)
    return _ratio(_norm(b - a), _norm(a))


def measure(a: np.ndarray, b: np.ndarray, dtype: str) -> Metrics:
    """All distances of B from A.

    Args:
        a: the reference.
        b: the other, of the same shape.
        dtype: the coarser type of the two, in whose units in the last place distances are counted.
    """
    shape, bits = a.shape, np.array_equal(a, b, equal_nan=True)
    whole = np.isfinite(a) & np.isfinite(b)
    x, y = _finite(a, b)
    if not x.size:
        return Metrics(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, bits, ())
    error, norm = np.abs(y - x), _norm(x)
    large = np.abs(x) > SMALL * norm / x.size**0.5
    relative = error[large] / np.abs(x[large]) if large.any() else np.zeros(1)
    units = ulp_distance(x, y, dtype)
    inner, other = float(np.dot(x, y)), _norm(y)
    thousandth = int((relative > 1e-3).sum())
    worst = np.flatnonzero(whole)[int(error.argmax())]
    return Metrics(
        relative_rms=_ratio(_norm(error), norm),
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        max_relative=float(relative.max()),
        mean_relative=float(relative.mean()),
        cosine=1.0 if norm == other == 0 else _ratio(inner, norm * other) if norm and other else 0.0,
        max_ulp=float(units.max()),
        mean_ulp=float(units.mean()),
        over_thousandth=thousandth / relative.size if thousandth > 1 else 0.0,
        equal=bits,
        worst=tuple(int(i) for i in np.unravel_index(worst, shape)),
    )


def histogram(a: np.ndarray, b: np.ndarray) -> dict[str, int]:
    """Number of entries by decade of |b - a| / |a|: `equal`, `1e-8` for [1e-8, 1e-7), and so on up to `1e+00`."""
    x, y = _finite(a, b)
    error = np.abs(y - x) / np.where(x == 0, 1.0, np.abs(x))
    counts = {"equal": int((error == 0).sum())}
    decade = np.clip(np.floor(np.log10(error[error > 0])), -17, 0).astype(int)
    return counts | {f"1e{d:+03d}": int((decade == d).sum()) for d in range(-17, 1) if (decade == d).any()}


@dataclass(frozen=True)
class Distribution:
    """Histograms of both sides and of their difference, in BINS bins of equal width."""

    low: float
    """Lower edge of the first bin of `a` and `b`: the smallest entry of either."""
    high: float
    """Upper edge of the last bin."""
    a: list[int]
    b: list[int]
    low_difference: float
    """Lower edge of the first bin of `difference`: the smallest b - a."""
    high_difference: float
    difference: list[int]


BINS = 40


def distribution(a: np.ndarray, b: np.ndarray) -> Distribution | None:
    """The distribution of the entries that are finite on both sides; None if there are none."""
    x, y = _finite(a, b)
    if not x.size:
        return None
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    error = y - x
    least, largest = float(error.min()), float(error.max())

    def counts(values: np.ndarray, start: float, stop: float) -> list[int]:
        edges = np.linspace(start, stop, BINS + 1)[1:-1]
        return np.bincount(np.searchsorted(edges, values, side="right"), minlength=BINS).tolist()

    return Distribution(
        low, high, counts(x, low, high), counts(y, low, high), least, largest, counts(error, least, largest)
    )


def _finite(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries that are finite in both, as flat float64 arrays."""
    whole = np.isfinite(a) & np.isfinite(b)
    return a[whole].astype(np.float64), b[whole].astype(np.float64)


def _norm(x: np.ndarray) -> float:
    """2-norm, scaled so that no square overflows."""
    largest = float(np.abs(x).max(initial=0.0))
    return largest * float(np.linalg.norm(x / largest)) if largest else 0.0


def _ratio(x: float, y: float) -> float:
    return x / y if y else (0.0 if x == 0 else float("inf"))
