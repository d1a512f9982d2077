"""Finds the first tensor, in the order of execution, that is wrong, and describes it in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from moeport.parity.recording import Recording
from moeport.parity.result import Culprit, Isolation, RoutingResult, StepResult, TensorResult, Verdict

INHERITED = 0.1
"""If the inputs' error is at least this share of a tensor's error, it may be the cause."""


def find_culprit(
    tensors: Sequence[TensorResult],
    trajectory: Sequence[StepResult],
    routing: Sequence[RoutingResult],
    isolation: Isolation | None,
) -> Culprit:
    """Where two sides that fail first diverge.

    Args:
        tensors: all tensors in the order of execution.
        trajectory: all steps.
        routing: all decisions.
        isolation: the result of B's operation on A's inputs, if that was tried for the culprit.
    """
    first = next((tensor for tensor in tensors if tensor.verdict == "fail"), None)
    if first is None:
        step = next((step for step in trajectory if step.verdict == "fail"), None)
        if step is None:
            return Culprit("nothing in common", "structure", "no tensor of A is in B")
        sentence = (
            f"the first step agrees, the loss exceeds its tolerance at step {step.step} "
            f"({step.loss_a:.6g} and {step.loss_b:.6g})"
        )
        return Culprit("trajectory", "trajectory", sentence)
    by_name = {tensor.name: tensor for tensor in tensors}
    inputs = [(name, by_name[name].error, by_name[name].verdict) for name in first.inputs if name in by_name]
    own = isolation if isolation and isolation.name == first.name else None
    name, sentence = _sentence(first, inputs, tensors, routing, own)
    if first.hint:
        sentence += f"; {first.hint}"
    return Culprit(name, first.kind, sentence, first.op, inputs, own)


def headline(
    verdict: Verdict,
    a: Recording,
    b: Recording,
    tensors: Sequence[TensorResult],
    routing: Sequence[RoutingResult],
    trajectory: Sequence[StepResult],
    culprit: Culprit | None,
    equal: bool,
    notes: Sequence[str],
) -> str:
    """The first line of a report."""
    if culprit:
        return f"FAIL {culprit.name}: {culprit.sentence}"
    sides = f"{b.name} against {a.name}"
    if equal:
        return f"PASS {sides}: {len(tensors)} tensors and {len(trajectory)} steps are bit-identical"
    flips = sum(found.near_ties for found in routing)
    ties = f"; {flips} of {sum(r.choices for r in routing)} choices differ, all near ties" if flips else ""
    if verdict == "warn":
        odd = [tensor for tensor in tensors if tensor.verdict == "warn"]
        if flips and len({tensor.reason for tensor in odd}) == 1 and odd[0].op != "topk_ids":
            return f"WARN {sides}: {len(odd)} of {len(tensors)} tensors cannot be judged{ties}; replay the routing"
        return f"WARN {sides}: {odd[0].name}: {odd[0].reason} ({len(odd)} of {len(tensors)} tensors warn){ties}"
    judged = [t for t in tensors if t.metrics and t.limit and not t.reason]
    if not judged:
        return f"PASS {sides}: {len(tensors)} tensors within tolerance{ties}"
    tight = max(judged, key=lambda t: t.error / t.limit)
    nearest = f"closest to its limit {tight.name} ({tight.error:.1e} of {tight.limit:.0e})"
    return f"PASS {sides}: {len(tensors)} tensors within tolerance, {nearest}{ties}"


def _sentence(
    first: TensorResult,
    inputs: Sequence[tuple[str, float, Verdict]],
    tensors: Sequence[TensorResult],
    routing: Sequence[RoutingResult],
    isolation: Isolation | None,
) -> tuple[str, str]:
    """Name of the culprit, and a sentence on it."""
    owner = first.name.partition(":")[2]
    others = sum(tensor.verdict == "fail" and tensor.kind == first.kind for tensor in tensors) - 1
    more = f", and of {others} more" if others else ""
    match first.kind:
        case "parameter":
            return f"parameter {owner}", f"the weights differ before anything is computed ({first.reason})"
        case "input":
            return f"input {first.name}", f"the inputs differ before anything is computed ({first.reason})"
        case "gradient":
            return (
                f"gradient of {owner}",
                f"the forward pass and the losses agree, this gradient does not{more} ({first.reason})",
            )
        case "training gradient":
            return (
                f"gradient of {owner} in the optimiser step",
                f"the gradients of the pass agree, those of the training step do not{more} ({first.reason})",
            )
        case "update":
            return f"optimiser update of {owner}", f"gradients agree, updates do not{more} ({first.reason})"
        case "decision":
            found = next(r for r in routing if r.name == first.name)
            return first.name, _decision(found)
    where = f"first tensor beyond tolerance ({first.reason}); "
    if isolation:
        origin = "own" if isolation.own else "inherited"
        return first.name, f"{where}on A's inputs it is off by {isolation.error:.1e} ({origin} error)"
    inherited = max((error for _, error, _ in inputs), default=0.0) > INHERITED * first.error
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
