"""When a tensor passes, warns or fails: all limits in one place; docs/parity.md prints them with their sources."""

from __future__ import annotations

from dataclasses import dataclass

from moeport.parity.recording import STORED, Kind

DTYPES = (*STORED, "bfloat16", "float16", "float32", "float64")
"""Types, the coarsest first; those of STORED are no compute types."""


@dataclass(frozen=True)
class Limits:
    """Limits for one compute type, which is the coarser of the two sides'."""

    unit: float
    """Unit roundoff u = 2^-p (IEEE 754-2019)."""
    forward: float
    """Relative RMS error of activations and scores. Ours: about ten times what was measured between backends."""
    loss: float
    """Relative error of losses, means over tokens in which errors cancel. Ours."""
    gradient: float
    """Relative RMS error of gradients. Ours."""
    moment: float
    """Relative RMS error of the optimiser's moments, and of gradients and moments in the second step. Ours: 4 times
    that of gradients, since a square has twice the relative error."""
    update: float
    """Relative RMS error of updates, beyond one ulp of the parameter, where the gradients agree. Ours."""
    trajectory: float
    """Relative difference of the losses at any step. Ours."""
    norm: float
    """Relative difference of the gradient norm at any step. Ours: 20 times what was measured or more."""
    cosine: float
    """Minimum cosine: msprobe's 0.99 (`COS_THRESHOLD`)."""
    thousandth: float | None
    """Largest share of entries with a relative error over 0.001: msprobe's 0.001. None if the type is too coarse."""
    isolated_ulp: float
    """Mean distance in units in the last place of an operation on the same inputs: msprobe's 1 and 32 for single
    operations (msprobe takes the largest, we take the mean over entries, since a sum can cancel)."""


LIMITS = {
    "float64": Limits(2**-53, 5e-14, 5e-14, 2e-13, 8e-13, 1e-4, 1e-9, 1e-6, 0.99, 0.001, 32.0),
    "float32": Limits(2**-24, 2e-5, 2e-5, 5e-5, 2e-4, 1e-2, 1e-4, 5e-3, 0.99, 0.001, 32.0),
    "float16": Limits(2**-11, 1e-2, 2e-3, 2e-2, 8e-2, 1e-1, 1e-2, 1e-1, 0.99, None, 1.0),
    "bfloat16": Limits(2**-8, 6e-2, 1e-2, 1e-1, 4e-1, 2e-1, 2e-2, 2e-1, 0.99, None, 1.0),
}
"""Limits by compute type."""

RATIO_MAX, RATIO_MEAN, RATIO_RMS = 10.0, 2.0, 2.0
"""Double benchmark: B's error relative to the golden is at most this many times A's, for the largest and the mean
relative error and the root mean square error (MindFormers, tests/utils/double_benchmark.py; also msprobe's benchmark
standard)."""
GOLDEN_NEAR = 0.2
"""Relative RMS error of A from a golden above which that is no golden, and excuses nothing. Ours."""
ROUNDINGS = 8
"""Error that an operation may always have, in unit roundoffs of its largest input: where terms cancel, the result is
small and its relative error large. Ours: at most 5.2 was measured, in the last iterations of Sinkhorn's algorithm."""
FEW = 16
"""Gradients of fewer entries may be off by the limit times the RMS of all gradients: each is a sum in which terms
cancel, and there are few entries to average over. Ours."""
SUSPICIOUS = 0.25
"""Above this share of its limit, a tensor that fails the double benchmark warns. Ours."""
LEAST_AGREEMENT = 0.9
"""Share of equal choices below which near ties warn: a tenth was seen between backends in bfloat16. Ours."""
GRADIENT_AGREES = 0.1
"""Updates are compared at entries whose gradients differ at most by this share. Ours."""
OTHER_ROUTING = 0.3
"""Relative RMS error of all gradients of the second step together, and of gradient norms, where the sides chose
differently. Ours: at most 0.12 was measured, and the gradient of another batch, or of two, is off by about 1."""
OTHER_LOSS = 2e-2
"""Relative difference of losses of steps in which the sides chose differently: the 2% rule, and the limit of bfloat16.
Ours: 7e-4 was measured where one of 128 choices was near."""
WRONG_ROW, SMALL_ROW = 0.6, 0.3
"""A row of an activation fails if it is off by this share of its norm, or of this share of the usual norm if that is
larger: 10 times the limit of bfloat16. Ours."""
RULE = {"float64": 1e-9, "float32": 1e-4}
"""Relative RMS error of moments from what A's optimiser makes of a side's own gradients, by the type of the parameter;
updates may be off by 10 times that and by one ulp of the parameter. Ours: 2e-7 was measured in float32."""
COVERAGE = 0.5
"""Share of a side's tensors that must be in the other for a part of a comparison to count as judged at all. Ours."""


def coarser(a: str, b: str) -> str:
    """The coarser of two types by name; unknown types count as float32."""
    known = [dtype for dtype in DTYPES if dtype in (a, b)]
    return known[0] if known else "float32"


def limit_of(kind: Kind, dtype: str, stored: str) -> float:
    """Largest relative RMS error of a tensor.

    Args:
        kind: its kind.
        dtype: compute type of the run.
        stored: type of the tensor itself, which limits the precision of tensors that are given, not computed.
    """
    least = 2.0 ** -STORED[stored] if stored in STORED else 0.0  # one rounding, as of weights in other types
    return max(_limit(kind, dtype, stored), least)


def _limit(kind: Kind, dtype: str, stored: str) -> float:
    limits = LIMITS[dtype]
    match kind:
        case "parameter" | "input" if stored in STORED:
            return 0.0
        case "parameter" | "input":
            return 2 * LIMITS[stored].unit
        case "loss":
            return limits.loss
        case "gradient" | "training gradient":
            return limits.gradient
        case "moment" | "second step":
            return limits.moment
        case "update":
            return limits.update
        case "decision" | "plan":
            return 0.0
        case _:
            return limits.forward
