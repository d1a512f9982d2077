"""Compares several variants of a config on one machine: `moeport parity run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from moeport.errors import UserError
from moeport.parity.compare import compare, routing_differs
from moeport.parity.coverage import asked_parts
from moeport.parity.isolate import isolate_operation
from moeport.parity.job import Job
from moeport.parity.record import record
from moeport.parity.recording import Recording
from moeport.parity.result import Comparison, Report, worst
from moeport.parity.subject import Size, Subject, Variant, build_subject
from moeport.parity.thresholds import coarser

GOLDEN = "numpy:fp64"
"""The default golden of the double benchmark."""
BACKWARD = ("gradient", "training gradient", "moment", "update", "state", "second step")
"""Kinds of tensors that a forward-only backend lacks."""
COMPUTED = ("activation", "score")
"""Kinds of tensors whose operation can be isolated."""


Side = Subject | Job
"""What can be compared: recorded in this process, or by several others."""


def run(
    file: Path | None,
    variants: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    size: Size | None = None,
    checkpoint: Path | None = None,
    golden: str | None = GOLDEN,
    isolate: bool = False,
    parts: Sequence[str] = (),
    report: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare variants of a config: the first is the reference for all others.

    Args:
        file: the YAML config; None to use only the defaults.
        variants: see `moeport.parity.subject.Variant.parse`; those of several ranks are started as processes.
        overrides: `KEY=VALUE` for all variants.
        size: how much to compute.
        checkpoint: run folder with the weights; default: the initial weights.
        golden: variant that serves as the golden of the double benchmark; None: no double benchmark.
        isolate: feed A's inputs to B's operation at the first divergence.
        parts: those of `moeport.parity.options.PARTS` to compare; default: all.
        report: is given a sentence on what is being done.
    """
    size = size or Size()
    asked = asked_parts(parts)
    if not {"optimizer", "trajectory"} & {*asked}:
        size = replace(size, steps=0)
    if isolate and size.micro_batches > 1:
        raise UserError(
            "--isolate: runs single operations in this process, on a batch in one piece; expected no variant with "
            f"@RANKS and no --micro-batches (got {size.micro_batches})"
        )
    subjects: list[Side] = []
    for spec in variants:
        report(f"preparing {spec}")
        if Variant.parse(spec).ranks > 1:
            subjects.append(Job(spec, file, overrides, size, checkpoint))
        else:
            subjects.append(build_subject(file, spec, overrides, size=size, checkpoint=checkpoint))
    exact = None
    if golden:
        report(f"preparing {golden}")
        exact = build_subject(file, golden, overrides, size=size, checkpoint=checkpoint)
    return compare_subjects(subjects, size.steps, golden=exact, isolate=isolate, parts=asked, report=report)


def compare_subjects(
    subjects: Sequence[Side],
    steps: int,
    *,
    golden: Subject | None = None,
    isolate: bool = False,
    parts: Sequence[str] = (),
    report: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare every other subject with the first. Takes the arguments of `run`."""
    first, *rest = subjects
    report(f"recording {first.name}")
    a = _record(first, steps)
    exact = None
    if golden:
        report(f"recording {golden.name} as golden, with the routing of {first.name}")
        exact = record(golden, steps=0, replay=a)
    comparisons = []
    for other in rest:
        report(f"recording {other.name}")
        b = _record(other, steps)
        replayed = None
        if routing_differs(a, b):
            report(f"recording {other.name} once more, with the routing of {first.name}")
            replayed = _record(other, min(steps, 1), replay=a)
        judge = partial(compare, a, b, golden=exact, replayed=replayed, parts=parts)
        found = judge()
        if isolate:
            found = _isolated(found, judge, (first, other), a, report)
        comparisons.append(found)
        a = _completed(a, replace(b, tensors=b.tensors | replayed.tensors) if replayed else b)
    return Report(worst([c.verdict for c in comparisons]), comparisons)


def _record(side: Side, steps: int, replay: Recording | None = None) -> Recording:
    if isinstance(side, Job):
        return side.record(steps=steps, replay=replay)
    return record(side, steps=steps, replay=replay)


def _completed(a: Recording, b: Recording) -> Recording:
    """A with B's gradients, updates and steps if A has none, so that the next side can be compared with them."""
    mine, its = ({t.kind for t in side.tensors.values()} & {"gradient", "update"} for side in (a, b))
    if coarser(a.dtype, b.dtype) != a.dtype or not its - mine:
        return a
    kinds = {kind for kind in BACKWARD if kind not in {t.kind for t in a.tensors.values()}}
    adopted = {name: t for name, t in b.tensors.items() if t.kind in kinds}
    trajectory = a.trajectory or b.trajectory
    note = f"compared with {b.name}, since {a.name} has none: {', '.join(sorted({t.kind for t in adopted.values()}))}"
    return replace(a, tensors=a.tensors | adopted, trajectory=trajectory, notes=[*a.notes, note])


def _isolated(
    found: Comparison,
    judge: Callable[..., Comparison],
    sides: tuple[Side, Side],
    a: Recording,
    report: Callable[[str], None],
) -> Comparison:
    """The comparison with the culprit's operation of B on the inputs of A, if that can be isolated."""
    first, other = sides
    if not (found.culprit and found.culprit.kind in COMPUTED and found.culprit.op):
        return found
    assert isinstance(first, Subject)
    assert isinstance(other, Subject)
    report(f"feeding the inputs of {first.name} to {found.culprit.name} of {other.name}")
    isolation = isolate_operation(first, other, a, found.culprit.name)
    return judge(isolation=isolation) if isolation else found
