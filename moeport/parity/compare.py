"""Compares recording B with recording A: a verdict for every tensor, and the first one that is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np

from moeport.errors import UserError
from moeport.parity import thresholds
from moeport.parity.adamw import OptimizerJudge
from moeport.parity.align import aligned
from moeport.parity.coverage import (
    UNJUDGED,
    asked_parts,
    check_computed,
    check_replay,
    coverage,
    one_sided,
    only,
)
from moeport.parity.culprit import find_culprit, headline
from moeport.parity.differences import differences
from moeport.parity.floats import NON_FINITE, FloatJudge, paired
from moeport.parity.hints import hint
from moeport.parity.metrics import distribution, histogram, relative_rms
from moeport.parity.reasons import notes, reasons
from moeport.parity.recording import MICRO_BATCHES, Keep, Recording, TensorRecord
from moeport.parity.result import (
    Comparison,
    Isolation,
    RoutingResult,
    Side,
    StepResult,
    TensorResult,
    worst,
)
from moeport.parity.routing import compare_decision
from moeport.parity.thresholds import LIMITS, coarser, limit_of
from moeport.parity.trajectory import compare_steps
from moeport.parity.twins import first_inequality

HISTOGRAMS = 20
"""Number of tensors with a histogram: those nearest to, or furthest beyond, their limit."""
STEPPED = ("training gradient", "moment", "update", "state", "second step")
"""Kinds of tensors of optimiser steps."""
OWN_GRADIENTS = "follows other gradients; it is what A's optimiser makes of them"
"""The reason given for what an optimiser made of gradients that follow other routing."""
TOGETHER = "follows other routing; judged with all gradients of the step"
"""The reason given for gradients of the second step where the sides chose differently."""


def compare(
    a: Recording,
    b: Recording,
    *,
    golden: Recording | None = None,
    replayed: Recording | None = None,
    names: Mapping[str, str] | None = None,
    isolation: Isolation | None = None,
    parts: Collection[str] = (),
) -> Comparison:
    """Compare two recordings.

    Args:
        a: the reference.
        b: the other, following its own routing, or A's if that is how it was recorded.
        golden: for the double benchmark; a recording in float64, best with A's routing.
        replayed: B recorded once more with A's routing; the forward pass, its gradients and the first optimiser step
            are then judged on it.
        names: maps B's names of tensors to A's where they differ.
        isolation: the result of feeding A's inputs to B's operation, for the culprit.
        parts: those of `moeport.parity.coverage.PARTS` to compare; default: all.

    Raises UserError if a side holds nothing that was computed, or if the sides were recorded in different ways.
    """
    asked = asked_parts(parts)
    for side in (a, b):
        check_computed(side)
    if a.sample_size != b.sample_size:
        raise UserError(
            f"{a.name} and {b.name} were sampled at {a.sample_size} and {b.sample_size} entries per tensor; "
            "record both with the same --sample-size"
        )
    micro = [side.environment.get(MICRO_BATCHES) for side in (a, b)]
    if None not in micro and micro[0] != micro[1]:
        raise UserError(
            f"{a.name} and {b.name} were recorded in {micro[0]} and {micro[1]} micro-batches; "
            "record both with the same --micro-batches"
        )
    if replayed:
        check_replay(a, b, replayed)
    if a.name == b.name:
        a, b = replace(a, name=f"{a.name} (A)"), replace(b, name=f"{b.name} (B)")
    if names:
        tensors = {names.get(name, name): t for name, t in b.tensors.items()}
        b = replace(b, tensors={name: replace(t, name=name) for name, t in tensors.items()})
    a, b = aligned(a, b)
    golden = aligned(a, golden)[1] if golden else None
    if golden and golden.replayed is None and routing_differs(a, golden):
        note = f"no double benchmark: {golden.name} chose other experts than {a.name}; record it with --replay A"
        a, golden = replace(a, notes=[*a.notes, note]), None
    return _Comparison(only(a, asked), only(b, asked), golden, replayed, asked).run(isolation)


def routing_differs(a: Recording, b: Recording) -> bool:
    """Whether any decision that both recordings hold differs."""
    pairs = ((t, b.tensors.get(name)) for name, t in a.tensors.items() if t.kind == "decision")
    return any(
        other is not None and t.values is not None and other.values is not None and (t.values != other.values).any()
        for t, other in pairs
    )


class _Comparison:
    def __init__(
        self,
        a: Recording,
        b: Recording,
        golden: Recording | None,
        replayed: Recording | None,
        asked: Collection[str],
    ):
        self.a, self.b, self.golden, self.replayed, self.asked = a, b, golden, replayed, asked
        self.dtype = coarser(a.dtype, b.dtype)
        self.limits = LIMITS[self.dtype]
        following = replayed.tensors.items() if replayed else ()
        self.judged = {**b.tensors, **{name: t for name, t in following if t.kind != "second step"}}
        """B's tensors, with A's routing where there are such."""
        self.floats = FloatJudge(a, b, golden, self.judged)
        self.optimizer = OptimizerJudge(a, b)
        self.own_routing = replayed is None and b.replayed is None
        self.routing: dict[str, RoutingResult] = {}
        self.flipped: str | None = None
        """The first decision that differs while B follows its own routing; None until one does."""

    def run(self, isolation: Isolation | None) -> Comparison:
        """Compare all tensors in the order of A, then the trajectory."""
        a, b = self.a, self.b
        both = [name for name in a.tensors if name in b.tensors]
        results = self._with_histograms([self._judge(order, name) for order, name in enumerate(both)])
        trajectory = self._steps() if "trajectory" in self.asked else []
        alone = one_sided(a, b)
        rows = coverage(a, b, self.asked, results, trajectory, alone)
        routing, unequal = list(self.routing.values()), differences(a, b)
        twins = first_inequality(a, b, unequal, results, trajectory)
        why = reasons(a, b, results, trajectory, rows, unequal, twins)
        verdict = worst([r.verdict for r in results] + [s.verdict for s in trajectory] + ["warn"] * bool(why))
        if not results or bool(a.non_finite) != bool(b.non_finite):
            verdict = "fail"
        culprit = None
        if verdict == "fail":
            odd = a.non_finite or b.non_finite
            culprit = find_culprit(results, trajectory, routing, isolation, alone, unequal, odd)
        equal = all(r.metrics.equal if r.metrics else r.error == 0 and r.keep != "statistics" for r in results) and all(
            s.loss_a == s.loss_b for s in trajectory
        )
        found = Comparison(
            headline="",
            verdict=verdict,
            a=_side(a),
            b=_side(b),
            golden=self.golden.name if self.golden else None,
            replayed=not self.own_routing,
            equal=equal and not alone,
            tensors=results,
            routing=routing,
            trajectory=trajectory,
            culprit=culprit,
            coverage=rows,
            reasons=why,
            only_a=[tensor.name for tensor in alone if tensor.side == "A"],
            only_b=[tensor.name for tensor in alone if tensor.side == "B"],
            one_sided=alone,
            differences=unequal,
            notes=notes(a, b, alone, self.flipped),
        )
        return replace(found, headline=headline(found))

    def _steps(self) -> list[StepResult]:
        return compare_steps(self.a.trajectory, self.b.trajectory, self.limits, self._any_flip())

    def _judge(self, order: int, name: str) -> TensorResult:
        """Compare one tensor."""
        a, free = self.a.tensors[name], self.b.tensors[name]
        b = self.judged[name]
        result = TensorResult(
            name=name,
            kind=a.kind,
            layer=a.layer,
            order=order,
            op=a.op,
            inputs=a.inputs,
            shape=a.shape,
            dtype_a=a.dtype,
            dtype_b=b.dtype,
            keep=_least(a.keep, b.keep),
            verdict="pass",
            reason="",
            error=0.0,
            limit=limit_of(a.kind, self.dtype, coarser(a.dtype, b.dtype)),
        )
        if not _same_shape(a.shape, b.shape):
            reason = f"shape {list(a.shape)} in A, {list(b.shape)} in B"
            return replace(result, verdict="fail", reason=reason, error=float("inf"))
        if a.kind == "decision" and a.values is not None and b.values is not None:
            result = self._decision(result, a, b, free)
        elif a.is_float:
            result = self.floats.judge(result, a, b, free)
        else:
            values = paired(a, b, self.a.sample_size)
            unequal = float((values[0] != values[1]).mean()) if values and values[0].size else 0.0
            if unequal:
                result = replace(result, verdict="fail", error=unequal, reason=f"{unequal:.2%} of the entries differ")
        if a.kind in STEPPED:
            return self._stepped(result, b is not free)
        return self._after_a_flip(result)

    def _stepped(self, result: TensorResult, replayed: bool) -> TensorResult:
        """Judge what belongs to an optimiser step also by A's rule, and not by A's gradients where B's follow other
        routing.
        """
        found = self.optimizer.deviation(result.name)
        if found and found.error > found.limit:
            error, limit = found.error, found.limit
            reason = f"relative error {error:.1e} from what A's optimiser makes of B's gradients, limit {limit:.0e}"
            looks = hint(found.expected, found.found, limit)
            return replace(result, verdict="fail", reason=reason, error=error, limit=limit, hint=looks)
        second = result.kind == "second step"
        other_routing = self._parted if second else not replayed and self._any_flip()
        if result.verdict != "fail" or not other_routing or result.reason.startswith(NON_FINITE):
            return result
        if found:
            return replace(result, verdict="pass", reason=OWN_GRADIENTS, hint=None)
        if second and "gradient:" in result.name and self._second_error <= thresholds.OTHER_ROUTING:
            return replace(result, verdict="pass", reason=TOGETHER, hint=None)
        if second and "gradient:" in result.name:
            error, limit = self._second_error, thresholds.OTHER_ROUTING
            reason = f"relative error {error:.1e} of all gradients of the second step together, limit {limit:.0e}"
            return replace(result, reason=reason, error=error, limit=limit)
        return replace(result, verdict="warn", reason=UNJUDGED)

    @cached_property
    def _parted(self) -> bool:
        """Whether the sides may have chosen differently up to the second step, of which no decision is recorded."""
        loads = [[step.expert_load for step in side.trajectory[:2]] for side in (self.a, self.b)]
        same = loads[0] == loads[1]
        return self._any_flip() or not same or self.dtype in ("bfloat16", "float16")

    @cached_property
    def _second_error(self) -> float:
        """Relative RMS error of all gradients of the second step together."""
        wanted = [name for name in self.a.tensors if name.startswith("step 2 gradient:") and name in self.b.tensors]
        pairs = [paired(self.a.tensors[name], self.b.tensors[name], self.a.sample_size) for name in wanted]
        if not pairs or any(pair is None for pair in pairs):
            return float("inf")
        x, y = (np.concatenate([np.ravel(pair[i]) for pair in pairs if pair]) for i in (0, 1))
        return relative_rms(x, y)

    def _decision(self, result: TensorResult, a: TensorRecord, b: TensorRecord, free: TensorRecord) -> TensorResult:
        scores = [recording.tensors.get(f"{a.name}.x") for recording in (self.a, self.replayed or self.b)]
        whole = [t.values if t and t.keep == "full" else None for t in scores]
        found = compare_decision(a, free, b if self.replayed else None, whole[0], whole[1], self.limits.forward)
        self.routing[a.name] = found
        differ = found.near_ties + found.other_scores + found.unexplained
        result = replace(
            result, error=differ / max(a.size, 1), free_error=1 - found.agreement if self.replayed else None
        )
        if found.unexplained:
            reason = f"{found.unexplained} of {a.size} choices do not follow from the scores"
            return replace(result, verdict="fail", reason=reason)
        if found.other_scores:
            reason = f"{found.other_scores} of {a.size} choices differ and are not near ties"
            return replace(result, verdict="fail", reason=reason)
        if differ and self.own_routing and self.flipped is None:
            self.flipped = a.name
        first = all(other.agreement == 1 for other in self.routing.values() if other is not found)
        if self.replayed and first and found.agreement != found.agreement_replayed:
            reason = "B chose differently when it ran a second time: it is not deterministic"
            return replace(result, verdict="warn", reason=reason)
        if a.op == "topk_ids" and result.error > 1 - thresholds.LEAST_AGREEMENT:
            return replace(result, verdict="warn", reason=f"{differ} of {a.size} choices differ, all near ties")
        return replace(result, reason=f"{differ} near ties" if differ else "")

    def _after_a_flip(self, result: TensorResult) -> TensorResult:
        """After a near tie that was decided differently, B computes something else: neither a pass nor a fail."""
        if result.verdict != "fail" or not self.flipped or self.flipped == result.name or self.replayed:
            return result
        if result.reason.startswith(NON_FINITE):
            return result
        if result.kind == "decision" and self.routing[result.name].unexplained:
            return result
        return replace(result, verdict="warn", reason=UNJUDGED)

    def _any_flip(self) -> bool:
        return any(found.agreement < 1 for found in self.routing.values())

    def _with_histograms(self, results: list[TensorResult]) -> list[TensorResult]:
        compared = [r for r in results if r.metrics and r.error]
        chosen = {r.name for r in sorted(compared, key=lambda r: r.severity, reverse=True)[:HISTOGRAMS]}
        out = []
        for result in results:
            a, b = self.a.tensors[result.name], self.judged[result.name]
            if result.name in chosen and (values := paired(a, b, self.a.sample_size)):
                result = replace(result, histogram=histogram(*values), distribution=distribution(*values))
            out.append(result)
        return out


def _least(a: Keep, b: Keep) -> Keep:
    order: tuple[Keep, ...] = ("statistics", "sample", "full")
    return next(keep for keep in order if keep in (a, b))


def _same_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are equal up to folded leading dimensions, such as (B, S, D) and (B S, D)."""
    return a == b or (bool(a) and bool(b) and a[-1] == b[-1] and np.prod(a) == np.prod(b))


def _side(recording: Recording) -> Side:
    return Side(
        name=recording.name,
        dtype=recording.dtype,
        environment=recording.environment,
        config=recording.config,
        notes=recording.notes,
        non_finite=recording.non_finite,
    )
