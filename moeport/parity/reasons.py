"""Why a comparison is no plain pass, and what its reader should know besides."""

from __future__ import annotations

from collections.abc import Sequence

from moeport.parity.coverage import KINDS, UNJUDGED, unjudged
from moeport.parity.differences import training_keys
from moeport.parity.floats import BOTH
from moeport.parity.recording import Recording
from moeport.parity.result import Coverage, Difference, OneSided, StepResult, TensorResult

BACKWARD = (*KINDS["gradients"], *KINDS["optimizer"])
"""Kinds of tensors that follow the forward pass."""


def reasons(
    a: Recording,
    b: Recording,
    tensors: Sequence[TensorResult],
    trajectory: Sequence[StepResult],
    rows: Sequence[Coverage],
    unequal: Sequence[Difference],
    twins: Sequence[str] = (),
) -> list[str]:
    """Why the comparison is no plain pass, apart from what fails; the most important reason first.

    Args:
        a: the reference.
        b: the other.
        tensors: all tensors.
        trajectory: all steps.
        rows: what was compared.
        unequal: what differs between the sides besides tensors.
        twins: the clause of `moeport.parity.twins`.
    """
    both = [t for t in tensors if t.verdict == "warn" and BOTH in t.reason]
    found = [f"{both[0].name}: {both[0].reason} (the first of {len(both)} tensors)"] if both else []
    if a.non_finite and b.non_finite and not both:
        found.append(f"not finite {BOTH}: {a.non_finite}")
    found += [step.reason for step in trajectory if step.verdict == "warn"][:1]
    found += twins
    found += unjudged(rows)
    if keys := training_keys(unequal):
        found.append(keys)
    odd = [t for t in tensors if t.verdict == "warn" and t.reason != UNJUDGED and t not in both]
    if odd:
        found.append(f"{odd[0].name}: {odd[0].reason} ({len(odd)} of {len(tensors)} tensors warn)")
    return found


def notes(a: Recording, b: Recording, alone: Sequence[OneSided], flipped: str | None) -> list[str]:
    """The notes of both sides, where their computations diverge, and what a near tie makes of the rest.

    Args:
        a: the reference.
        b: the other.
        alone: tensors that only one side has.
        flipped: the first decision that differs, if nothing after it could be judged.
    """
    common = any(name in b.tensors for name in a.tensors)
    found = [] if common else ["the two recordings have no tensor in common"]
    found += [f"{side.name}: {note}" for side in (a, b) for note in side.notes]
    found += [f"{side.name}: the first {side.non_finite}" for side in (a, b) if side.non_finite]
    for letter, mine, other in (("A", a, b), ("B", b, a)):
        own = [tensor for tensor in alone if tensor.side == letter and not tensor.excused]
        forward = [tensor for tensor in own if mine.tensors[tensor.name].kind not in BACKWARD]
        if forward:
            place = f" after {forward[0].after}" if forward[0].after else ""
            has = f"{mine.name} has {forward[0].name}, {other.name} does not"
            found.append(f"the computations diverge{place}: {has}")
    if flipped:
        found.append(
            f"{flipped}: near ties were decided differently, so what follows is another computation; "
            "to compare only the arithmetic, record B once more with --replay A, and compare with --replayed"
        )
    return found
