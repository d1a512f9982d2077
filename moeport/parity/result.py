"""What a comparison found: plain data, complete enough for any report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moeport.parity.metrics import Distribution, Metrics
from moeport.parity.recording import Keep, Kind

Verdict = Literal["pass", "warn", "fail"]

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "warn": 0, "fail": 1}
"""Of the command; `--strict` makes a warning 1."""


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest of some verdicts; pass if there is none."""
    order: tuple[Verdict, ...] = ("fail", "warn", "pass")
    return next((verdict for verdict in order if verdict in verdicts), "pass")


@dataclass(frozen=True)
class DoubleBenchmark:
    """Errors of both sides against a golden."""

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
    """Place in the execution of A, from 0."""
    op: str | None
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    keep: Keep
    """Compared on all entries, on a sample, or by statistics: the least that both sides kept."""
    verdict: Verdict
    reason: str
    """Why it is not a plain pass; empty for one."""
    error: float
    """Relative RMS error; by statistics, a lower bound of it. For decisions and plans the share of unequal entries."""
    limit: float
    """What `error` was held against."""
    free_error: float | None = None
    """Relative RMS error when B followed its own routing; None where `error` says it."""
    metrics: Metrics | None = None
    """None for integers, and where only statistics were kept."""
    golden: DoubleBenchmark | None = None
    histogram: dict[str, int] | None = None
    """Entries by decade of relative error; for the worst tensors."""
    distribution: Distribution | None = None
    """Entries of both sides and of their difference; for the same tensors."""
    hint: str | None = None
    """What the difference looks like, such as `rows 1, 2 of 4 differ`; for tensors that fail."""

    @property
    def nearness(self) -> float:
        """Error as a share of the limit; the error itself where the limit is 0."""
        return self.error / self.limit if self.limit else self.error

    @property
    def gravity(self) -> tuple[int, float]:
        """For sorting: those that fail first, then warnings, then plain passes; then by nearness to the limit."""
        grade = {"fail": 3, "warn": 2, "pass": 0 if self.reason else 1}
        return grade[self.verdict], self.nearness


@dataclass(frozen=True)
class Flip:
    """One choice that differs."""

    row: int
    """Token, or row of the scores."""
    choice: int
    """Which of the K choices, from 0."""
    a: int
    b: int
    """What A and B chose."""
    gap: float
    """A's score of its own choice less its score of B's."""
    error: float
    """How far the two sides are apart in these two scores, added up."""
    cause: Literal["near tie", "other scores", "unexplained"]
    """`near tie`: the gap is within what rounding does to scores. `other scores`: the scores differ by more than that.
    `unexplained`: the scores of B do not lead to B's choice."""


@dataclass(frozen=True)
class RoutingResult:
    """One decision on both sides."""

    name: str
    layer: int | None
    op: str | None
    rows: int
    """Tokens."""
    choices: int
    """Entries in all."""
    agreement: float
    """Share of equal entries when each side follows its own routing."""
    agreement_replayed: float | None
    """The same when B follows A's routing up to here; None without a replay."""
    near_ties: int
    other_scores: int
    unexplained: int
    """Entries by cause, of the replay where there is one."""
    flips: list[Flip] = field(default_factory=list)
    """The widest gaps first, at most `MAX_FLIPS`."""
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


@dataclass(frozen=True)
class Isolation:
    """B's operation on A's inputs."""

    name: str
    error: float
    """Relative RMS error of its output against A's."""
    mean_ulp: float
    own: bool
    """Whether the error is the operation's own."""


@dataclass(frozen=True)
class Culprit:
    """Where the sides part."""

    name: str
    kind: str
    sentence: str
    """What is wrong with it, for the first line of a report."""
    op: str | None = None
    inputs: list[tuple[str, float, Verdict]] = field(default_factory=list)
    """What the operation read: name, error, verdict."""
    isolation: Isolation | None = None


@dataclass(frozen=True)
class Difference:
    """What is not the same on both sides, besides the tensors."""

    key: str
    """Such as `config model.norm_eps`, `version torch` or `variable OMP_NUM_THREADS`."""
    a: str
    """A's value; a dash where it has none."""
    b: str


@dataclass(frozen=True)
class Side:
    """One side, as the report names it."""

    name: str
    dtype: str
    environment: dict[str, Any]
    config: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Comparison:
    """A against B."""

    headline: str
    """The first line: the verdict and the culprit."""
    verdict: Verdict
    a: Side
    b: Side
    golden: str | None
    replayed: bool
    """Whether the tensors are those of B with A's routing."""
    equal: bool
    """Whether every tensor agrees to the bit."""
    tensors: list[TensorResult]
    routing: list[RoutingResult]
    trajectory: list[StepResult]
    culprit: Culprit | None
    only_a: list[str]
    only_b: list[str]
    """Tensors that one side alone has."""
    differences: list[Difference]
    """What differs in config, versions and environment, but for the keys that name a variant."""
    notes: list[str]


@dataclass(frozen=True)
class Report:
    """All comparisons of a run."""

    verdict: Verdict
    comparisons: list[Comparison]

    def to_json(self) -> str:
        """The whole report; numbers that are not finite become strings, since JSON has none."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
