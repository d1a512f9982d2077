"""The verdict on a float tensor: limits, the double benchmark, and errors that rounding explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeport.parity import thresholds
from moeport.parity.hints import hint
from moeport.parity.metrics import measure, relative_rms, same_non_finite, ulp
from moeport.parity.recording import STORED, Recording, Statistics, TensorRecord, sample_indices
from moeport.parity.result import DoubleBenchmark, TensorResult, Verdict
from moeport.parity.store import statistics_of
from moeport.parity.thresholds import LIMITS, coarser

NON_FINITE = "NaN or infinity"
"""Beginning of the reason for a tensor that is not finite on one side, or, if only statistics were kept, on both."""
BOTH = "on both sides"
"""Part of the reason for a tensor that is not finite on both."""
MASKS = "minus infinity on both sides"
"""Beginning of the reason for a mask."""
MASKED = ("score", "input", "parameter", "state")
"""Kinds of tensors in which minus infinity may mask entries."""
MASKING = ("where", "arithmetic")
"""Operations of which the same is true."""
SUMS = ("gradient", "training gradient", "moment", "second step")
"""Kinds of tensors whose few entries are judged by the size of all."""
UPDATES = ("update:", "step 2 update:")
"""Beginnings of the names of updates."""


class FloatJudge:
    """Judges float tensors of two sides.

    Args:
        a: the reference.
        b: the other.
        golden: for the double benchmark; None to do without it.
        judged: tensors of B that are judged, of which some follow A's routing; by default B's own.
    """

    def __init__(
        self,
        a: Recording,
        b: Recording,
        golden: Recording | None,
        judged: Mapping[str, TensorRecord] | None = None,
    ):
        self.a, self.b, self.golden = a, b, golden
        self.judged = b.tensors if judged is None else judged
        self.limits = LIMITS[coarser(a.dtype, b.dtype)]

    def judge(self, result: TensorResult, a: TensorRecord, b: TensorRecord, free: TensorRecord) -> TensorResult:
        """Judge a float tensor.

        Args:
            result: what is known so far.
            a: A's.
            b: B's, recorded with A's routing if there is such a recording.
            free: B's, following its own routing.
        """
        values = self._paired(a, b)
        if values is None:
            return self._by_statistics(result, a, b)
        x, y = values
        if not same_non_finite(x, y):
            sides = [side for side, v in (("A", x), ("B", y)) if not np.isfinite(v).all()]
            reason = f"{NON_FINITE} in {' and '.join(sides)}, not at the same positions"
            return replace(result, verdict="fail", reason=reason, error=float("inf"))
        metrics = measure(x, y, coarser(a.dtype, b.dtype))
        result = replace(result, metrics=metrics, error=metrics.relative_rms)
        is_update = a.name.startswith(UPDATES)
        result = self._update(result, x, y) if is_update else self._against_limits(result, a, b, free)
        return result if result.verdict == "fail" else _non_finite(result, x)

    def _against_limits(
        self, result: TensorResult, a: TensorRecord, b: TensorRecord, free: TensorRecord
    ) -> TensorResult:
        values = self._paired(a, b)
        assert values
        x, y = values
        if b is not free and (own := self._paired(a, free)) is not None:
            result = replace(result, free_error=relative_rms(*own))
        exact = self.golden.tensors.get(a.name) if self.golden else None
        if exact and (first := self._paired(exact, a)) and (second := self._paired(exact, b)):
            result = replace(result, golden=_double_benchmark(*first, second[1], self.limits.unit))
        return self._verdict(result, x, y)

    def _verdict(self, result: TensorResult, x: np.ndarray, y: np.ndarray) -> TensorResult:
        """Judge by the limits, the least cosine, the thousandth rule and the double benchmark."""
        metrics, limits, double = result.metrics, self.limits, result.golden
        assert metrics
        verdict: Verdict = "pass"
        reason = ""
        if metrics.relative_rms > result.limit:
            verdict, reason = "fail", f"relative error {metrics.relative_rms:.1e}, limit {result.limit:.0e}"
        elif metrics.cosine < limits.cosine:
            verdict, reason = "fail", f"cosine {metrics.cosine:.4f}, at least {limits.cosine}"
        elif result.kind == "activation" and result.keep == "full" and (wrong := wrong_rows(x, y)):
            verdict, reason = "fail", wrong
        elif (
            limits.thousandth is not None
            and result.kind != "second step"
            and coarser(result.dtype_a, result.dtype_b) not in STORED
            and metrics.over_thousandth > limits.thousandth
        ):
            share = f"{metrics.over_thousandth:.2%}"
            verdict, reason = "warn", f"{share} of the entries have a relative error above 0.001"
        elif double and self._suspicious(result, double):
            ratio = f"{double.ratio_rms:.1f}"
            verdict, reason = "warn", f"{ratio} times as far from the golden as A (double benchmark)"
        if verdict == "pass":
            return result
        if self._cancels(result, x, y):
            return replace(result, reason="small compared with its inputs: within their rounding")
        near = double is not None and double.error_a <= thresholds.GOLDEN_NEAR
        if double and near and double.passed and metrics.cosine >= limits.cosine:
            return replace(result, reason="beyond the limit, but no further from the golden than A (double benchmark)")
        found = hint(x, y, result.limit) if verdict == "fail" else None
        return replace(result, verdict=verdict, reason=reason, hint=found)

    def _suspicious(self, result: TensorResult, double: DoubleBenchmark) -> bool:
        """Whether B is much further from the golden than A although both compute in the same type."""
        used = result.error > thresholds.SUSPICIOUS * result.limit
        return used and not double.passed and self.a.dtype == self.b.dtype

    def _cancels(self, result: TensorResult, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether an error is large only because cancellation, or summing to a few entries, made the result small."""
        if result.kind in SUMS and x.size < thresholds.FEW:
            label = result.name.partition(":")[0]
            every = [t for t in self.a.tensors.values() if t.kind == result.kind and t.name.startswith(f"{label}:")]
            squares = sum(t.size * rms**2 for t in every if (rms := _rms(t)))
            allowed = result.limit * (squares / sum(t.size for t in every)) ** 0.5
        else:
            given = (self.a.tensors.get(name) for name in result.inputs)
            allowed = thresholds.ROUNDINGS * self.limits.unit * max((_rms(t) for t in given if t), default=0.0)
        whole = np.isfinite(x) & np.isfinite(y)
        return bool(np.sqrt(np.mean(np.square((y - x)[whole], dtype=np.float64))) <= allowed)

    def _update(self, result: TensorResult, x: np.ndarray, y: np.ndarray) -> TensorResult:
        """Judge an update: it is known up to one ulp of its parameter, and compared where the gradients agree."""
        label, _, owner = result.name.partition(":")
        parameter = self.a.tensors.get(f"parameter:{owner}")
        stored = coarser(result.dtype_a, result.dtype_b)
        limit = self.limits.update
        norm = np.sqrt(np.mean(np.square(x))) if x.size else 0.0
        if parameter and norm:
            magnitude = (
                np.abs(parameter.values)
                if parameter.values is not None
                else parameter.statistics.rms
                if parameter.statistics
                else 0.0
            )
            limit += float(np.sqrt(np.mean(np.square(ulp(np.asarray(magnitude), stored)))) / norm)
        agree = np.ones(x.shape, bool)
        gradient = label.replace("update", "gradient") if label != "update" else "training gradient"
        g_a, g_b = (tensors.get(f"{gradient}:{owner}") for tensors in (self.a.tensors, self.judged))
        if g_a and g_b and (pair := self._paired(g_a, g_b)) and pair[0].shape == x.shape:
            agree = np.abs(pair[1] - pair[0]) <= thresholds.GRADIENT_AGREES * np.abs(pair[0])
        error = relative_rms(x[agree], y[agree])
        result = replace(result, error=error, limit=limit)
        if error > limit:
            reason = f"relative error {error:.1e} where the gradients agree, limit {limit:.0e}"
            return replace(result, verdict="fail", reason=reason, hint=hint(x[agree], y[agree], max(limit, 1e-2)))
        return result

    def _by_statistics(self, result: TensorResult, a: TensorRecord, b: TensorRecord) -> TensorResult:
        """Judge by mean and RMS: | ||a|| - ||b|| | <= ||b - a|| and |mean(b - a)| <= rms(b - a)."""
        s, t = _statistics(a), _statistics(b)
        if s is None or t is None:
            return result
        finite = [np.isfinite(x.mean) and np.isfinite(x.rms) for x in (s, t)]
        if finite[0] != finite[1]:
            reason = f"{NON_FINITE} only in {'B' if finite[0] else 'A'}"
            return replace(result, verdict="fail", reason=reason, error=float("inf"))
        if not finite[0]:
            return replace(result, verdict="warn", reason=f"{NON_FINITE} on both sides")
        difference = max(abs(s.rms - t.rms), abs(s.mean - t.mean))
        error = difference / s.rms if s.rms else (0.0 if difference == 0 else float("inf"))
        slack = 1e-5 if coarser(a.dtype, b.dtype) != "float64" else 1e-12  # sums are rounded, too
        result = replace(result, error=error, limit=result.limit + slack)
        if error > result.limit:
            reason = f"mean or RMS differ by {error:.1e} of the RMS, limit {result.limit:.0e}"
            return replace(result, verdict="fail", reason=reason)
        return result

    def _paired(self, a: TensorRecord, b: TensorRecord) -> tuple[np.ndarray, np.ndarray] | None:
        return paired(a, b, self.a.sample_size)


def _non_finite(result: TensorResult, x: np.ndarray) -> TensorResult:
    """A warning if both sides are not finite at the same places, except for minus infinity in a mask."""
    finite = np.isfinite(x)
    if finite.all():
        return result
    count = f"at the same {int((~finite).sum())} of {x.size} places"
    is_module = bool(result.op and result.op[0].isupper())  # any module of a model from elsewhere may return a mask
    masks = result.kind in MASKED or (result.kind == "activation" and (is_module or result.op in MASKING))
    if masks and (x[~finite] == -np.inf).all() and finite.any():
        return replace(result, reason=result.reason or f"{MASKS} {count}")
    what = "NaN" if np.isnan(x).any() else "infinity"
    return replace(result, verdict="warn", reason=f"{what} on both sides, {count}")


def wrong_rows(x: np.ndarray, y: np.ndarray) -> str:
    """A clause on rows that are quite different, although among many others they hardly count; empty without any.

    A row that is dropped, or taken from another token, is off by about 100%. Small rows count as large ones.
    """
    if x.ndim < 2 or not x.size:
        return ""
    a, b = (values.reshape(-1, x.shape[-1]).astype(np.float64) for values in (x, y))
    sizes, errors = np.linalg.norm(a, axis=1), np.linalg.norm(b - a, axis=1)
    usual = float(np.sqrt(np.mean(sizes * sizes)))
    wrong = np.flatnonzero(errors > thresholds.WRONG_ROW * np.maximum(sizes, thresholds.SMALL_ROW * usual))
    if not wrong.size:
        return ""
    first = int(wrong[0])
    share = errors[first] / sizes[first] if sizes[first] else np.inf
    what = f"row {first} of {len(a)} is off by {share:.0%}" if np.isfinite(share) else f"row {first} is 0 only in A"
    return f"{what}, and {wrong.size - 1} more" if wrong.size > 1 else what


def paired(a: TensorRecord, b: TensorRecord, sample_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Entries of both at the same positions; None if one has only statistics.

    Args:
        a: the one, which gives the result its shape if both are whole.
        b: the other.
        sample_size: entries of a sampled tensor.
    """
    if a.values is None or b.values is None:
        return None
    if a.keep == b.keep == "full":
        return a.values, b.values.reshape(a.values.shape)
    x, y = (
        t.values.reshape(-1)[sample_indices(t.size, sample_size)] if t.keep == "full" else t.values
        for t in (a, b)
        if t.values is not None
    )
    return x, y


def _double_benchmark(exact: np.ndarray, a: np.ndarray, b: np.ndarray, unit: float) -> DoubleBenchmark:
    """Ratios of B's errors to A's, both against the golden; A's count as at least the unit roundoff."""
    first, second = measure(exact, a, "float64"), measure(exact, b, "float64")

    def ratio(x: float, y: float) -> float:
        return y / max(x, unit)

    rms = ratio(first.relative_rms, second.relative_rms)
    mean = ratio(first.mean_relative, second.mean_relative)
    largest = ratio(first.max_relative, second.max_relative)
    return DoubleBenchmark(
        error_a=first.relative_rms,
        error_b=second.relative_rms,
        ratio_rms=rms,
        ratio_mean=mean,
        ratio_max=largest,
        passed=rms <= thresholds.RATIO_RMS and mean <= thresholds.RATIO_MEAN and largest <= thresholds.RATIO_MAX,
    )


def _statistics(record: TensorRecord) -> Statistics | None:
    if record.statistics or record.values is None or not record.values.size:
        return record.statistics
    return statistics_of(record.values)


def _rms(record: TensorRecord) -> float:
    """RMS of the kept entries of a float tensor, without infinities; 0 for other tensors."""
    if not record.is_float:
        return 0.0
    if record.values is None:
        return record.statistics.rms if record.statistics else 0.0
    x = record.values[np.isfinite(record.values)].astype(np.float64)
    return float(np.sqrt(np.mean(x * x))) if x.size else 0.0
