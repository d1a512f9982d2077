"""Finds the first tensor, in the order of execution, that is wrong, and describes it in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from moeport.parity.coverage import GIVEN, UNJUDGED, qualifiers
from moeport.parity.differences import training_keys
from moeport.parity.floats import BOTH, MASKS, NON_FINITE
from moeport.parity.recorder import LAYOUT
from moeport.parity.result import (
    Comparison,
    Culprit,
    Difference,
    Isolation,
    OneSided,
    RoutingResult,
    StepResult,
    TensorResult,
    Verdict,
)

AFTER_RATES = ("moment", "update", "second step")
"""Kinds of tensors that depend on the keys of the optimiser, the learning rate among them."""
AFTER_THE_PASS = {
    "gradient": ("gradient of {owner}", "the forward pass and the losses agree, this gradient does not"),
    "training gradient": (
        "gradient of {owner} in the optimiser step",
        "the gradients of the pass agree, those of the training step do not",
    ),
    "moment": (
        "optimiser moment {label} of {owner}",
        "gradients agree, what the optimiser keeps of them does not",
    ),
    "update": ("optimiser update of {owner}", "gradients agree, updates do not"),
    "state": ("state {owner}", "it differs after the step or the pass"),
    "second step": ("{label} of {owner}", "the first optimiser step agrees, the second does not"),
}
"""How a culprit is named and described, by its kind."""
REASONS = 3
"""Maximum number of reasons in the first line."""
INHERITED = 0.1
"""If the inputs' error is at least this share of a tensor's error, it may be the cause."""


def find_culprit(
    tensors: Sequence[TensorResult],
    trajectory: Sequence[StepResult],
    routing: Sequence[RoutingResult],
    isolation: Isolation | None,
    alone: Sequence[OneSided] = (),
    unequal: Sequence[Difference] = (),
    non_finite: str | None = None,
) -> Culprit:
    """Where two sides that fail first diverge.

    Args:
        tensors: all tensors in the order of execution.
        trajectory: all steps.
        routing: all decisions.
        isolation: the result of B's operation on A's inputs, if that was tried for the culprit.
        alone: tensors that only one side has.
        unequal: what differs between the sides besides their tensors.
        non_finite: the first tensor of a side that is not finite.
    """
    first = next((tensor for tensor in tensors if tensor.verdict == "fail"), None)
    step = next((step for step in trajectory if step.verdict == "fail"), None)
    keys = training_keys(unequal, "optimizer.")
    if step and (first is None or (first.kind in AFTER_RATES and step.lr_a != step.lr_b)):
        agrees = "" if step.step == 1 else "the first step agrees, "
        return Culprit("trajectory", "trajectory", "; ".join(filter(None, (f"{agrees}{step.reason}", keys))))
    if first is None and tensors and non_finite:
        return Culprit("not finite", "structure", "only one side has a NaN or an infinity")
    if first is None:
        return Culprit("nothing in common", "structure", "no tensor of A is in B")
    by_name = {tensor.name: tensor for tensor in tensors}
    inputs = [(name, by_name[name].error, by_name[name].verdict) for name in first.inputs if name in by_name]
    own = isolation if isolation and isolation.name == first.name else None
    name, sentence = _sentence(first, inputs, tensors, routing, own)
    further = [first.hint, _alone_before(first, tensors, alone), _not_finite(first, tensors)]
    if first.kind in AFTER_RATES:
        further.append(keys)
    return Culprit(name, first.kind, "; ".join(filter(None, (sentence, *further))), first.op, inputs, own)


def _alone_before(first: TensorResult, tensors: Sequence[TensorResult], alone: Sequence[OneSided]) -> str:
    """A clause on what only one side computes between the tensor before the first that fails, and that one."""
    before = next((t.name for t in reversed(tensors) if t.order < first.order and t.kind not in GIVEN), None)
    between = [tensor for tensor in alone if tensor.after == before and not tensor.excused]
    again = [tensor for tensor in alone if tensor.name.rpartition("#")[0] == first.name.partition("#")[0]]
    if again and not between:
        return f"only {again[0].side} has {again[0].name}, so it computes this more often than the other side"
    if not between or before is None:
        return ""
    return f"only {between[0].side} has {between[0].name}, between {before} and {first.name}"


def _not_finite(first: TensorResult, tensors: Sequence[TensorResult]) -> str:
    """A clause on the first tensor that is not finite on one side, if that is not the first that fails."""
    odd = next((tensor for tensor in tensors if tensor.reason.startswith(NON_FINITE)), None)
    return f"{odd.name}: {odd.reason}" if odd and odd is not first else ""


def headline(found: Comparison) -> str:
    """The first line of a report; the line of `found` itself is not read."""
    tensors, routing = found.tensors, found.routing
    if found.culprit:
        words = [reason for reason in found.reasons[:1] if BOTH in reason]
        words = words or [f"{s.name}: first {s.non_finite}" for s in (found.a, found.b) if s.non_finite]
        return "; ".join([f"FAIL {found.culprit.name}: {found.culprit.sentence}", *words])
    sides = f"{found.b.name} against {found.a.name}"
    flips = sum(one.near_ties for one in routing)
    ties = f"; {flips} of {sum(r.choices for r in routing)} choices differ, all near ties" if flips else ""
    if found.verdict == "warn":
        more = f"; {len(found.reasons) - REASONS} more reasons" if len(found.reasons) > REASONS else ""
        unjudged = any(tensor.reason == UNJUDGED for tensor in tensors)
        replay = "; replay the routing" if unjudged else ""
        return f"WARN {sides}: {'; '.join(found.reasons[:REASONS])}{more}{ties}{replay}"
    notes = "".join(f"; {words}" for words in [*qualifiers(found.coverage), *_masks(tensors)])
    if found.equal:
        steps = f" and {len(found.trajectory)} steps" if found.trajectory else ""
        return f"PASS {sides}: {len(tensors)} tensors{steps} are bit-identical{notes}"
    judged = [t for t in tensors if t.metrics and t.limit and not t.reason]
    if not judged:
        return f"PASS {sides}: {len(tensors)} tensors within tolerance{notes}{ties}"
    tight = max(judged, key=lambda t: t.error / t.limit)
    nearest = f"closest to its limit {tight.name} ({tight.error:.1e} of {tight.limit:.0e})"
    return f"PASS {sides}: {len(tensors)} tensors within tolerance, {nearest}{notes}{ties}"


def _masks(tensors: Sequence[TensorResult]) -> list[str]:
    masked = [tensor for tensor in tensors if tensor.reason.startswith(MASKS)]
    return [f"{MASKS} in {len(masked)} tensors, first in {masked[0].name}"] if masked else []


def _sentence(
    first: TensorResult,
    inputs: Sequence[tuple[str, float, Verdict]],
    tensors: Sequence[TensorResult],
    routing: Sequence[RoutingResult],
    isolation: Isolation | None,
) -> tuple[str, str]:
    """Name of the culprit, and a sentence on it."""
    label, _, owner = first.name.partition(":")
    others = sum(tensor.verdict == "fail" and tensor.kind == first.kind for tensor in tensors) - 1
    more = f", and of {others} more" if others else ""
    if first.kind in AFTER_THE_PASS:
        name, sentence = AFTER_THE_PASS[first.kind]
        return name.format(label=label, owner=owner), f"{sentence}{more} ({first.reason})"
    if first.kind == "parameter":
        return f"parameter {owner}", f"the weights differ before anything is computed ({first.reason})"
    if first.kind == "input":
        return f"input {first.name}", f"the inputs differ before anything is computed ({first.reason})"
    if first.kind == "decision":
        return first.name, _decision(next(r for r in routing if r.name == first.name))
    where = f"first tensor beyond tolerance ({first.reason}); "
    if isolation:
        origin = "own" if isolation.own else "inherited"
        return first.name, f"{where}on A's inputs it is off by {isolation.error:.1e} ({origin} error)"
    inherited = max((error for _, error, _ in inputs), default=0.0) > INHERITED * first.error
    if first.op == LAYOUT:
        source = ", ".join(name for name, _, _ in inputs) or "its sources"
        reads = first.name.rpartition(".")[0]
        return (
            first.name,
            f"{where}between {source}, which agrees, and {reads}: another layout",
        )
    if first.op == "arithmetic" or (first.op is None and not inputs):
        return first.name, f"{where}plain arithmetic computed it from tensors that agree (own error)"
    if inherited:
        return first.name, f"{where}its inputs are off too (own or inherited: see --isolate)"
    return first.name, f"{where}its inputs agree (own error)"


def _decision(found: RoutingResult) -> str:
    if found.unexplained:
        tied = all(flip.gap == 0 for flip in found.flips if flip.cause == "unexplained")
        finding = "the scores agree, the choices do not follow from them"
        rule = "a tie is broken the other way" if tied else "the chosen scores are not the largest"
        return f"{finding}: {rule} for {found.unexplained} of {found.choices} choices"
    return f"{found.other_scores} of {found.choices} choices differ by more than rounding of the scores explains"
