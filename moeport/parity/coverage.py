"""What of two recordings was compared, what was not, and why: what was not judged never counts as passed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from moeport.errors import UserError
from moeport.parity import thresholds
from moeport.parity.differences import differences, training_keys
from moeport.parity.options import PARTS
from moeport.parity.recorder import LAYOUT
from moeport.parity.recording import INSIDE_UNSEEN, NO_GRADIENTS, NO_TRAINING, Kind, Recording
from moeport.parity.result import Coverage, Judged, OneSided, StepResult, TensorResult

GIVEN: tuple[Kind, ...] = ("parameter", "input")
"""Kinds of what is given, not computed."""
KINDS: dict[str, tuple[Kind, ...]] = {
    "weights and inputs": GIVEN,
    "forward": ("activation", "score", "loss", "plan"),
    "routing": ("decision",),
    "gradients": ("gradient",),
    "optimizer": ("training gradient", "moment", "update", "state", "second step"),
}
"""Kinds of tensors of each part but the trajectory."""
UNABLE = {"gradients": NO_GRADIENTS, "optimizer": NO_TRAINING, "trajectory": NO_TRAINING}
"""The note of a side that was asked for a part and could not compute it."""
EXTRA = ("routed_mlp", LAYOUT)
"""Operations that are recorded in addition to others: the first only where a backend fuses its parts, the second only
where entries are kept, and not in bundles of format version 1.
"""
UNJUDGED = "follows a near tie that was decided differently"
"""The reason given for tensors that are not judged."""


def asked_parts(parts: Collection[str]) -> tuple[str, ...]:
    """The parts to compare, all if none are named. Raises UserError for other names."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: unknown part {part!r}; expected some of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts or not parts)


def only(recording: Recording, parts: Collection[str]) -> Recording:
    """A recording without what belongs to other parts."""
    kinds = [*GIVEN, *(kind for part in parts for kind in KINDS.get(part, ()))]
    tensors = {name: tensor for name, tensor in recording.tensors.items() if tensor.kind in kinds}
    return replace(recording, tensors=tensors)


def check_computed(recording: Recording) -> None:
    """Raises UserError for a recording that holds nothing that was computed."""
    if not recording.trajectory and all(tensor.kind in GIVEN for tensor in recording.tensors.values()):
        held = f"{len(recording.tensors)} weights and inputs" if recording.tensors else "nothing"
        raise UserError(
            f"{recording.name}: holds {held} and nothing that was computed, so there is nothing to compare; "
            "run a forward pass of the recorded model while it is recorded"
        )


def check_replay(a: Recording, b: Recording, replayed: Recording) -> None:
    """Raises UserError if a recording is not B with A's routing, since B would then be judged by something else."""
    if replayed.replayed != a.name:
        followed = f"the routing of {replayed.replayed}" if replayed.replayed else "its own routing"
        raise UserError(
            f"the recording to be judged in place of {b.name} followed {followed}; record B once more with the routing "
            f"of {a.name} (--replay)"
        )
    keys = training_keys(differences(b, replayed))
    if keys or replayed.dtype != b.dtype or replayed.environment.get("backend") != b.environment.get("backend"):
        raise UserError(
            f"{replayed.name} is another variant than {b.name}: {keys or 'backend or type differ'}; record {b.name} "
            f"once more with the routing of {a.name} (--replay)"
        )


def one_sided(a: Recording, b: Recording) -> list[OneSided]:
    """Tensors that only one side has, at their places."""
    found: list[OneSided] = []
    for letter, mine, other in (("A", a, b), ("B", b, a)):
        after = None
        unseen = _inside_unseen(other)
        for name, tensor in mine.tensors.items():
            if name in other.tensors:
                after = name
                continue
            inside = unseen and tensor.kind in ("input", *KINDS["forward"], *KINDS["routing"])
            found.append(OneSided(name, "A" if letter == "A" else "B", after, inside or tensor.op in EXTRA))
    order = {name: i for i, name in enumerate(a.tensors)}
    return sorted(found, key=lambda tensor: order.get(tensor.name, order.get(tensor.after or "", -1)))


def coverage(
    a: Recording,
    b: Recording,
    parts: Collection[str],
    results: Sequence[TensorResult],
    trajectory: Sequence[StepResult],
    alone: Sequence[OneSided],
) -> list[Coverage]:
    """A row for each part."""
    rows = [_tensors(a, b, part, parts, results, alone) for part in KINDS]
    return [*rows, _trajectory(a, b, parts, trajectory)]


def _tensors(
    a: Recording,
    b: Recording,
    part: str,
    parts: Collection[str],
    results: Sequence[TensorResult],
    alone: Sequence[OneSided],
) -> Coverage:
    kinds = KINDS[part]
    of_a, of_b = (sum(t.kind in kinds for t in side.tensors.values()) for side in (a, b))
    group = [result for result in results if result.kind in kinds]
    compared = sum(result.reason != UNJUDGED for result in group)

    def row(judged: Judged, reason: str = "") -> Coverage:
        return Coverage(part, compared, of_a, of_b, judged, reason)

    if part not in parts and part in PARTS:
        return row("not asked", "left out by --parts")
    if not of_a and not of_b:
        why = _unable(part, a, b)
        return row("not judged", why) if why else row("not asked", "neither side has any")
    if part == "routing" and _inside_unseen(a, b) and not compared:
        counts = any(result.kind == "plan" and "chosen" in result.name for result in results)
        return (
            row("judged", "by how often each expert was chosen") if counts else row("not judged", _missing(a, b, 0, 1))
        )
    if not group:
        return row("not judged", _unable(part, a, b) or _missing(a, b, of_a, of_b))
    if compared < len(group):
        return row("partly", f"{len(group) - compared} of {len(group)} follow other routing: replay the routing")
    blurred = sum(result.keep == "statistics" for result in group)
    if blurred:
        return row("partly", f"{blurred} of {len(group)} by mean and RMS only, which cannot show that they agree")
    missing = [t for t in alone if (a if t.side == "A" else b).tensors[t.name].kind in kinds]
    open_ = [tensor for tensor in missing if not tensor.excused]
    if open_:
        share = min(len(group) / of for of in (of_a, of_b))
        return row("partly" if share >= thresholds.COVERAGE else "not judged", _named(open_, len(group), of_a, of_b))
    if any((a if t.side == "A" else b).tensors[t.name].op not in EXTRA for t in missing):
        return row("judged", "from outside: blocks are compiled or recomputed")
    return row("judged")


def _trajectory(a: Recording, b: Recording, parts: Collection[str], trajectory: Sequence[StepResult]) -> Coverage:
    of_a, of_b, compared = len(a.trajectory), len(b.trajectory), len(trajectory)

    def row(judged: Judged, reason: str = "") -> Coverage:
        return Coverage("trajectory", compared, of_a, of_b, judged, reason)

    if "trajectory" not in parts:
        return row("not asked", "left out by --parts")
    if not of_a and not of_b:
        why = _unable("trajectory", a, b)
        return row("not judged", why) if why else row("not asked", "neither side has any")
    if not compared:
        return row("not judged", _unable("trajectory", a, b) or _missing(a, b, of_a, of_b))
    if of_a != of_b:
        return row("partly", f"{a.name} has {of_a} steps, {b.name} has {of_b}")
    return row("judged")


def _unable(part: str, *sides: Recording) -> str:
    """Why a side that was asked for a part has none of it; empty if none says so."""
    start = UNABLE.get(part)
    notes = [note for side in sides for note in side.notes if start and note.startswith(start)]
    return notes[0].removeprefix(start or "") if notes else ""


def _inside_unseen(*sides: Recording) -> bool:
    return any(note.startswith(INSIDE_UNSEEN) for side in sides for note in side.notes)


def _missing(a: Recording, b: Recording, of_a: int, of_b: int) -> str:
    if of_a and of_b:
        return f"of {of_a} tensors of {a.name} and {of_b} of {b.name}, none has the same name"
    return f"only {(a if of_a else b).name} has them"


def _named(missing: Iterable[OneSided], compared: int, of_a: int, of_b: int) -> str:
    """The share of the tensors that both sides have, and the first that one side lacks."""
    first = next(iter(missing))
    place = f", after {first.after}" if first.after else ""
    return f"{compared} of {of_a} tensors of A and of {of_b} of B; only {first.side} has {first.name}{place}"


def unjudged(rows: Sequence[Coverage]) -> list[str]:
    """A clause for each reason for which parts were not judged, or not wholly."""
    verbs: dict[Judged, str] = {"partly": "compared in part", "not judged": "not compared"}
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.judged in verbs:
            groups.setdefault((verbs[row.judged], row.reason), []).append(row.part)
    return [f"{' and '.join(parts)} {verb} ({reason})" for (verb, reason), parts in groups.items()]


def qualifiers(rows: Sequence[Coverage]) -> list[str]:
    """What a reader of a pass should know of how its parts were judged."""
    return [f"{row.part} {row.reason}" for row in rows if row.judged == "judged" and row.reason]
