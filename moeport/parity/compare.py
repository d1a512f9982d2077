"""Compares recording B with recording A: a verdict for every tensor, and the first one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeport.errors import UserError
from moeport.parity import thresholds
from moeport.parity.culprit import find_culprit, headline
from moeport.parity.differences import differences
from moeport.parity.floats import FloatJudge, paired
from moeport.parity.metrics import distribution, histogram
from moeport.parity.recording import MICRO_BATCHES, Keep, Recording, TensorRecord
from moeport.parity.result import Comparison, Isolation, RoutingResult, Side, StepResult, TensorResult, worst
from moeport.parity.routing import compare_decision
from moeport.parity.thresholds import LIMITS, coarser, limit_of

HISTOGRAMS = 20
"""Number of tensors with a histogram: those nearest to, or furthest beyond, their limit."""
FOLLOWS = "follows a near tie that was decided differently"
"""The reason given for tensors that are not judged."""
TRAINED = ("training gradient", "update")
"""Kinds of tensors of the optimiser step, which always follows a side's own routing."""


def compare(
    a: Recording,
    b: Recording,
    *,
    golden: Recording | None = None,
    replayed: Recording | None = None,
    names: Mapping[str, str] | None = None,
    isolation: Isolation | None = None,
) -> Comparison:
    """Compare two recordings.

    Args:
        a: the reference.
        b: the other, following its own routing, or A's if that is how it was recorded.
        golden: for the double benchmark; a recording in float64, best with A's routing.
        replayed: B recorded once more with A's routing; the forward pass and its gradients are then judged on it.
        names: maps B's names of tensors to A's where they differ.
        isolation: the result of feeding A's inputs to B's operation, for the culprit.
    """
    if a.sample_size != b.sample_size:
        raise UserError(
            f"{a.name} and {b.name} were sampled at {a.sample_size} and {b.sample_size} entries per tensor; "
            "record both with the same --sample-size"
        )
    parts = [side.environment.get(MICRO_BATCHES) for side in (a, b)]
    if None not in parts and parts[0] != parts[1]:
        raise UserError(
            f"{a.name} and {b.name} were recorded in {parts[0]} and {parts[1]} micro-batches; "
            "record both with the same --micro-batches"
        )
    if names:
        tensors = {names.get(name, name): t for name, t in b.tensors.items()}
        b = replace(b, tensors={name: replace(t, name=name) for name, t in tensors.items()})
    if golden and golden.replayed is None and routing_differs(a, golden):
        note = f"no double benchmark: {golden.name} chose other experts than {a.name}; record it with --replay A"
        a, golden = replace(a, notes=[*a.notes, note]), None
    return _Comparison(a, b, golden, replayed).run(isolation)


def routing_differs(a: Recording, b: Recording) -> bool:
    """Whether any decision that both recordings hold differs."""
    pairs = ((t, b.tensors.get(name)) for name, t in a.tensors.items() if t.kind == "decision")
    return any(
        other is not None and t.values is not None and other.values is not None and (t.values != other.values).any()
        for t, other in pairs
    )


class _Comparison:
    def __init__(self, a: Recording, b: Recording, golden: Recording | None, replayed: Recording | None):
        self.a, self.b, self.golden, self.replayed = a, b, golden, replayed
        self.dtype = coarser(a.dtype, b.dtype)
        self.limits = LIMITS[self.dtype]
        self.floats = FloatJudge(a, b, golden)
        self.own_routing = replayed is None and b.replayed is None
        self.routing: dict[str, RoutingResult] = {}
        self.flipped: str | None = None
        """The first decision that differs while B follows its own routing; None until one does."""

    def run(self, isolation: Isolation | None) -> Comparison:
        """Compare all tensors in the order of A, then the trajectory."""
        both = [name for name in self.a.tensors if name in self.b.tensors]
        results = [self._judge(order, name) for order, name in enumerate(both)]
        results = self._with_histograms(results)
        trajectory = [self._step(i) for i in range(min(len(self.a.trajectory), len(self.b.trajectory)))]
        only_a = [name for name in self.a.tensors if name not in self.b.tensors]
        only_b = [name for name in self.b.tensors if name not in self.a.tensors]
        routing = list(self.routing.values())
        verdict = worst([r.verdict for r in results] + [s.verdict for s in trajectory])
        notes = self._notes(only_a, only_b)
        if not both:
            verdict = "fail"
            notes.insert(0, "the two recordings have no tensor in common")
        culprit = find_culprit(results, trajectory, routing, isolation) if verdict == "fail" else None
        equal = all(r.metrics.equal if r.metrics else r.error == 0 and r.keep != "statistics" for r in results) and all(
            s.loss_a == s.loss_b for s in trajectory
        )
        return Comparison(
            headline=headline(verdict, self.a, self.b, results, routing, trajectory, culprit, equal, notes),
            verdict=verdict,
            a=_side(self.a),
            b=_side(self.b),
            golden=self.golden.name if self.golden else None,
            replayed=not self.own_routing,
            equal=equal and not only_a and not only_b,
            tensors=results,
            routing=routing,
            trajectory=trajectory,
            culprit=culprit,
            only_a=only_a,
            only_b=only_b,
            differences=differences(self.a, self.b),
            notes=notes,
        )

    def _judge(self, order: int, name: str) -> TensorResult:
        """Compare one tensor."""
        a, free = self.a.tensors[name], self.b.tensors[name]
        b = free
        if self.replayed and a.kind not in TRAINED and name in self.replayed.tensors:
            b = self.replayed.tensors[name]
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
        return self._after_a_flip(result)

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
        trained = result.kind in TRAINED and self._any_flip()
        if trained and self.replayed and result.kind == "training gradient":
            return replace(result, verdict="pass", reason=FOLLOWS)
        follows = self.flipped or trained
        if result.verdict != "fail" or not follows or self.flipped == result.name:
            return result
        if result.kind == "decision" and self.routing[result.name].unexplained:
            return result
        if self.replayed:
            return result
        return replace(result, verdict="warn", reason=FOLLOWS)

    def _any_flip(self) -> bool:
        return any(found.agreement < 1 for found in self.routing.values())

    def _with_histograms(self, results: list[TensorResult]) -> list[TensorResult]:
        compared = [r for r in results if r.metrics and r.error]
        chosen = {r.name for r in sorted(compared, key=lambda r: r.severity, reverse=True)[:HISTOGRAMS]}
        out = []
        for result in results:
            if result.name in chosen:
                source = self.b if result.kind in TRAINED or not self.replayed else self.replayed
                if values := paired(self.a.tensors[result.name], source.tensors[result.name], self.a.sample_size):
                    result = replace(result, histogram=histogram(*values), distribution=distribution(*values))
            out.append(result)
        return out

    def _step(self, i: int) -> StepResult:
        s, t = self.a.trajectory[i], self.b.trajectory[i]
        difference = abs(t.loss - s.loss) / abs(s.loss) if s.loss else abs(t.loss)
        limit = self.limits.trajectory
        loads = np.abs(np.subtract(s.expert_load, t.expert_load)) if s.expert_load else np.zeros(1)
        return StepResult(
            step=s.step,
            loss_a=s.loss,
            loss_b=t.loss,
            difference=difference,
            limit=limit,
            verdict="pass" if difference <= limit else "fail",
            grad_norm_a=s.grad_norm,
            grad_norm_b=t.grad_norm,
            load_difference=float(loads.max(initial=0.0)),
        )

    def _notes(self, only_a: list[str], only_b: list[str]) -> list[str]:
        notes = [f"{side.name}: {note}" for side in (self.a, self.b) for note in side.notes]
        notes += [f"{side.name}: the first {side.non_finite}" for side in (self.a, self.b) if side.non_finite]
        kinds = ("gradient", "training gradient", "update")
        opaque = any("inside of blocks" in note for note in notes)
        for mine, other, names in ((self.a, self.b, only_a), (self.b, self.a, only_b)):
            forward = [name for name in names if mine.tensors[name].kind not in kinds]
            if forward and not opaque:
                notes.append(f"the computations diverge: {mine.name} has {forward[0]}, {other.name} does not")
        if self.flipped:
            notes.append(
                f"{self.flipped}: near ties were decided differently, so what follows is another computation; "
                "to compare only the arithmetic, record B once more with --replay A, and compare with --replayed"
            )
        return notes


def _least(a: Keep, b: Keep) -> Keep:
    order: tuple[Keep, ...] = ("statistics", "sample", "full")
    return next(keep for keep in order if keep in (a, b))


def _same_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are equal up to folded leading dimensions, such as (B, S, D) and (B S, D)."""
    return a == b or (bool(a) and bool(b) and a[-1] == b[-1] and np.prod(a) == np.prod(b))


def _side(recording: Recording) -> Side:
    return Side(recording.name, recording.dtype, recording.environment, recording.config, recording.notes)
