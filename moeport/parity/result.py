"""The result of a comparison: plain data, complete enough for any report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moeport.parity.metrics import Distribution, Metrics
from moeport.parity.recording import Keep, Kind

Verdict = Literal["pass", "warn", "fail"]

REPORT_FORMAT, REPORT_VERSION = "moeport-parity-report", 2
"""In the JSON file. Version 1 had neither key, and no coverage."""
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "warn": 0, "fail": 1}
"""Exit codes of the command; with `--strict`, a warning gives 1."""


def worst(verdicts: Sequence[str]) -> Verdict:
    """The worst of some verdicts; pass if there are none, or none of these."""
    order: tuple[Verdict, ...] = ("fail", "warn", "pass")
    return next((verdict for verdict in order if verdict in verdicts), "pass")


@dataclass(frozen=True)
class DoubleBenchmark:
    """Errors of both sides relative to a golden."""

    error_a: float
    """Relative RMS error of A."""
    error_b: float
    ratio_rms: float
    """Error of B over that of A, or over the unit roundoff if A's is smaller."""
    ratio_mean: float
    """The same for the mean relative error."""
    ratio_max: float
    """The same for the largest relative error."""
    passed: bool


@dataclass(frozen=True)
class TensorResult:
    """One tensor on both sides."""

    name: str
    kind: Kind
    layer: int | None
    order: int
    """Position in the execution of A, counted from 0."""
    op: str | None
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    keep: Keep
    """Whether all entries, a sample or statistics were compared: the least that both sides kept."""
    verdict: Verdict
    reason: str
    """Why it is not a plain pass; empty for a plain pass."""
    error: float
    """Relative RMS error, or its lower bound from statistics. For decisions and plans, the share of unequal entries."""
    limit: float
    """The limit that `error` was compared with."""
    free_error: float | None = None
    """Relative RMS error when B followed its own routing; None if that is `error`."""
    metrics: Metrics | None = None
    """None for integers, and if only statistics were kept."""
    golden: DoubleBenchmark | None = None
    histogram: dict[str, int] | None = None
    """Number of entries by decade of relative error, for the worst tensors."""
    distribution: Distribution | None = None
    """Histograms of both sides and of their difference, for the same tensors."""
    hint: str | None = None
    """What the difference looks like, such as `rows 1, 2 of 4 differ`, for tensors that fail."""

    @property
    def nearness(self) -> float:
        """Error divided by the limit, or the error itself if the limit is 0."""
        return self.error / self.limit if self.limit else self.error

    @property
    def severity(self) -> tuple[int, float]:
        """Sort key: highest for fail, then warn, then pass; within a verdict by nearness to the limit."""
        grade = {"fail": 3, "warn": 2, "pass": 0 if self.reason else 1}
        return grade[self.verdict], self.nearness


@dataclass(frozen=True)
class Flip:
    """One choice that differs."""

    row: int
    """Token, or row of the scores."""
    choice: int
    """Which of the K choices, counted from 0."""
    a: int
    b: int
    """The choices of A and B."""
    gap: float
    """A's score of its own choice minus its score of B's choice."""
    error: float
    """Difference of the two sides in these two scores, added up."""
    cause: Literal["near tie", "other scores", "unexplained"]
    """`near tie`: rounding of the scores explains the gap. `other scores`: the scores differ by more than that.
    `unexplained`: B's choice does not follow from B's scores."""


@dataclass(frozen=True)
class RoutingResult:
    """One decision on both sides."""

    name: str
    layer: int | None
    op: str | None
    rows: int
    """Tokens."""
    choices: int
    """Total number of choices."""
    agreement: float
    """Share of equal entries when each side follows its own routing."""
    agreement_replayed: float | None
    """The same when B follows A's routing up to here; None without a replay."""
    near_ties: int
    other_scores: int
    unexplained: int
    """Number of differing entries by cause, in the replay if there is one."""
    flips: list[Flip] = field(default_factory=list)
    """Differing choices, widest gaps first, at most `MAX_FLIPS`."""
    flipped_rows: list[int] = field(default_factory=list)
    """All rows with a flip when each side follows its own routing."""
    flipped_rows_replayed: list[int] | None = None
    """The same when B follows A's routing up to here; None without a replay."""


MAX_FLIPS = 20


@dataclass(frozen=True)
class StepResult:
    """One step of both trajectories."""

    step: int
    loss_a: float
    loss_b: float
    difference: float
    """|b - a| / |a| of the loss."""
    limit: float
    verdict: Verdict
    grad_norm_a: float
    grad_norm_b: float
    load_difference: float
    """Largest difference of an expert's share of the assignments, over layers."""
    lr_a: float = 0.0
    lr_b: float = 0.0
    """Learning rates."""
    reason: str = ""
    """Why it is not a pass."""


@dataclass(frozen=True)
class Isolation:
    """B's operation on A's inputs."""

    name: str
    error: float
    """Relative RMS error of its output against A's."""
    mean_ulp: float
    own: bool
    """Whether the operation itself causes the error."""


@dataclass(frozen=True)
class Culprit:
    """Where the sides first diverge."""

    name: str
    kind: str
    sentence: str
    """What is wrong with it, for the first line of a report."""
    op: str | None = None
    inputs: list[tuple[str, float, Verdict]] = field(default_factory=list)
    """Inputs of the operation: name, error, verdict."""
    isolation: Isolation | None = None


@dataclass(frozen=True)
class Difference:
    """A difference between the sides, other than in tensors."""

    key: str
    """A key such as `config model.norm_eps`, `version torch` or `variable OMP_NUM_THREADS`."""
    a: str
    """A's value; a dash if it has none."""
    b: str


Judged = Literal["judged", "partly", "not judged", "not asked"]


@dataclass(frozen=True)
class Coverage:
    """How much of one part of the two sides was compared."""

    part: str
    """One of `moeport.parity.coverage.PARTS`, or the weights and inputs."""
    compared: int
    """Tensors, or steps of the trajectory, that both sides have and that were judged."""
    of_a: int
    """Those of A."""
    of_b: int
    judged: Judged
    """`partly` and `not judged` make a pass a warning. `not asked`: neither side has any, or the user left it out."""
    reason: str
    """What was not compared, and why; empty if everything was."""


@dataclass(frozen=True)
class OneSided:
    """A tensor that only one side has."""

    name: str
    side: Literal["A", "B"]
    after: str | None
    """The last tensor before it, in the order of its side, that both have; None if it comes first."""
    excused: bool
    """Whether the other side could not have it: what is compiled shows nothing of its inside."""


@dataclass(frozen=True)
class Side:
    """One side, as described in the report."""

    name: str
    dtype: str
    environment: dict[str, Any]
    config: dict[str, Any]
    notes: list[str]
    non_finite: str | None = None
    """The first tensor with a NaN or an infinity that is no mask."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of B with A."""

    headline: str
    """The first line: the verdict and the culprit."""
    verdict: Verdict
    a: Side
    b: Side
    golden: str | None
    replayed: bool
    """Whether B's tensors were recorded with A's routing."""
    equal: bool
    """Whether all tensors are bit-identical."""
    tensors: list[TensorResult]
    routing: list[RoutingResult]
    trajectory: list[StepResult]
    culprit: Culprit | None
    coverage: list[Coverage]
    """What was compared of each part, what was not, and why."""
    reasons: list[str]
    """Why it is no plain pass, the most important first: what was not judged, keys that differ, tensors that warn."""
    only_a: list[str]
    only_b: list[str]
    """Tensors that only one side has."""
    one_sided: list[OneSided]
    """The same with their places, in the order of execution."""
    differences: list[Difference]
    """Differences in config, versions and environment, except the keys that define a variant."""
    notes: list[str]


@dataclass(frozen=True)
class Report:
    """All comparisons of a run."""

    verdict: Verdict
    comparisons: list[Comparison]

    def to_json(self) -> str:
        """The whole report; NaNs and infinities become strings, since JSON has none."""
        header = {"format": REPORT_FORMAT, "format_version": REPORT_VERSION}
        return json.dumps(header | _plain(asdict(self)), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
