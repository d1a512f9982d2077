"""Records a subject: a forward and a backward pass of the first batch, and some optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from moeport.core.moments import MOMENTS
from moeport.core.ops import Ops
from moeport.errors import UserError
from moeport.model.loss_terms import LossTerms
from moeport.parity.exchange import NOTE
from moeport.parity.model import COUNTS, LOSSES
from moeport.parity.nonfinite import find_first
from moeport.parity.parts import Part, gather, join, split
from moeport.parity.passes import (
    backward_order,
    differentiate,
    divide,
    model_of,
    outside_experts,
    over_ranks,
    recorded_model_of,
)
from moeport.parity.recorder import Recorder, Replayer
from moeport.parity.recording import (
    INSIDE_UNSEEN,
    MICRO_BATCHES,
    NO_TRAINING,
    SAMPLE_SIZE,
    Keep,
    Kind,
    Recording,
    environment,
)
from moeport.parity.steps import OptimizerStep, Replay, Trained, train
from moeport.parity.subject import Subject


def record(
    subject: Subject,
    *,
    steps: int = 5,
    keep: Mapping[str, Keep] | None = None,
    replay: Recording | None = None,
    sample_size: int = SAMPLE_SIZE,
) -> Recording:
    """Record a forward and backward pass, and some optimiser steps.

    Every rank of the subject's mesh calls it and gets the recording of all ranks together.

    Args:
        subject: the subject to record.
        steps: number of optimiser steps in the trajectory; of the first two, gradients, moments and updates are
            recorded.
        keep: how much of each kind is kept; default: everything.
        replay: take every routing decision of the pass and of the first step from this recording, which must hold
            decisions in full.
        sample_size: entries of a sampled tensor.

    A NaN or infinity ends the steps, but not the recording, which names the first tensor that has one.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN is recorded and named, not warned of
        return _record(subject, steps, keep, replay, sample_size)


def _record(
    subject: Subject, steps: int, keep: Mapping[str, Keep] | None, replay: Recording | None, sample_size: int
) -> Recording:
    """As `record`."""
    backend = subject.backend
    if replay and (parts := replay.environment.get(MICRO_BATCHES, 1)) != subject.num_parts:
        raise UserError(
            f"{replay.name} was recorded in {parts} micro-batches, {subject.name} is in {subject.num_parts}; "
            "record both with the same --micro-batches"
        )
    replayed = decisions(replay) if replay else {}
    recorder = Recorder(keep, replayed, sample_size)
    machine = environment(backend.name, backend.device, backend.versions(), backend.kernel_choices())
    recording = Recording(
        name=subject.name,
        dtype=backend.dtype,
        config=subject.config.model_dump(mode="json"),
        environment=machine | _ranks(subject),
        replayed=replay.name if replay else None,
        sample_size=sample_size,
    )
    for name, value in subject.params.items():
        recorder.put(f"parameter:{name}", "parameter", value)
    if subject.num_parts > 1:
        trained = _record_parts(subject, recorder, recording, steps, replayed)
    else:
        trained = _record_whole(subject, recorder, recording, steps, replayed)
    if steps and not recording.trajectory:
        recording.notes.append(f"{NO_TRAINING}{backend.name} does not train")
    recording.tensors = recorder.finish()
    recording.environment["kernels"] = backend.kernel_choices()  # now that it is known what they could not serve
    recording.non_finite = find_first(subject, recording, trained, replayed)
    return recording


def decisions(recording: Recording) -> dict[str, np.ndarray]:
    """Every decision by name, for a replay.

    Raises UserError if one was not kept in full.
    """
    found = {}
    for name, tensor in recording.tensors.items():
        if tensor.kind == "decision":
            if tensor.values is None or tensor.keep != "full":
                raise UserError(
                    f"{recording.name}: {name} was not kept in full, so the routing cannot be replayed; "
                    "record with --keep decision=full"
                )
            found[name] = tensor.values
    return found


def _ranks(subject: Subject) -> dict[str, Any]:
    """The ranks that compute it, for the environment."""
    mesh = subject.mesh
    return {
        MICRO_BATCHES: subject.num_parts,
        "ranks": mesh.world.size,
        "nodes": len(set(mesh.world.nodes)),
        "ranks of each copy of the experts": mesh.experts.size,
        "all-to-all": subject.config.comm.algorithm if mesh.experts.size > 1 else "none",
    }


def _record_whole(
    subject: Subject, recorder: Recorder, recording: Recording, steps: int, replayed: Mapping[str, np.ndarray]
) -> Trained | None:
    """Record a batch in one piece; returns its optimiser steps."""
    if subject.opaque_blocks:
        trained = train(subject, recorder, recorded_model_of(subject, recorder, inside_blocks=False), steps)
        if trained and "model:loss" not in recorder.tensors:
            _put_terms(recorder, subject.backend.ops, trained.terms[0])
        if any(tensor.kind == "activation" for tensor in recorder.tensors.values()):
            recording.notes.append(f"{INSIDE_UNSEEN} not recorded: they are compiled or recomputed")
        else:
            recording.notes.append(f"{INSIDE_UNSEEN} and their outputs not recorded: the pass is one compiled graph")
        gradients = trained.steps[0].gradients if trained else {}
    else:
        lm = recorded_model_of(subject, recorder)
        gradients = differentiate(subject, lm, subject.micro_batches(lm)[0], recording)
        trained = _train(subject, recorder, steps, [replayed] if replayed else [])
    _put_results(subject, recorder, recording, _Results(gradients, trained, recorder.parameters))
    return trained


def _train(
    subject: Subject, recorder: Recorder, steps: int, replayed: Sequence[Mapping[str, np.ndarray]]
) -> Trained | None:
    """Train, the first step with the routing of `replayed`, for each micro-batch of this rank, if there is any."""
    if not steps:
        return None
    if not replayed:
        return train(subject, recorder, model_of(subject), steps)
    replayer = Replayer()
    lm = recorded_model_of(subject, replayer)
    if subject.num_parts > 1:
        outside_experts(subject, lm)
    eager = subject.config.model_copy(
        update={"backend": subject.config.backend.model_copy(update={"compile": False})}
    )  # a graph cannot be told what to choose
    return train(replace(subject, config=eager), recorder, lm, steps, Replay(replayer, replayed))


def _record_parts(
    subject: Subject, recorder: Recorder, recording: Recording, steps: int, replayed: Mapping[str, np.ndarray]
) -> Trained | None:
    """Record a batch in micro-batches, on one rank or on several; returns its optimiser steps."""
    mesh, inside = subject.mesh, Recorder()
    own: list[Part] = []
    if subject.opaque_blocks:
        trained = train(subject, recorder, model_of(subject), steps)
        for terms in trained.terms if trained else ():
            _put_terms(inside, subject.backend.ops, terms)
            own.append(inside.take())
        recording.notes.append(f"{INSIDE_UNSEEN} and their outputs not recorded: they are compiled or recomputed")
        gradients = trained.steps[0].gradients if trained else {}
    else:
        lm = recorded_model_of(subject, inside)
        divide(subject, lm)
        pieces = {name: split(values, subject.num_parts) for name, values in replayed.items()}
        batches, sums = subject.micro_batches(lm), dict[str, np.ndarray]()
        first = mesh.world.rank * len(batches)
        follow = [{name: piece[first + i] for name, piece in pieces.items()} for i in range(len(batches))]
        for decided, batch in zip(follow, batches, strict=True):
            inside.follow(decided)
            for name, gradient in differentiate(subject, lm, batch, recording).items():
                sums[name] = sums.get(name, 0.0) + gradient.astype(np.float64)
            own.append(inside.take())
        gradients = over_ranks(subject, lm, sums)
        trained = _train(subject, recorder, steps, follow if replayed else [])
        recording.notes.append(NOTE)
    for tensor in join(gather(mesh.world, own)).values():
        recorder.put_record(tensor)
    _put_results(subject, recorder, recording, _Results(gradients, trained, inside.parameters))
    return trained


@dataclass(frozen=True)
class _Results:
    """The last part of a recording."""

    gradients: Mapping[str, np.ndarray]
    """Whole gradients of the loss of the pass."""
    trained: Trained | None
    parameters: Sequence[str]
    """Names of the parameters in the order of their first use."""


def _put_results(subject: Subject, recorder: Recorder, recording: Recording, results: _Results) -> None:
    """Record gradients and the results of training."""
    trained = results.trained
    for name in backward_order(model_of(subject), results.gradients, results.parameters):
        recorder.put(f"gradient:{name}", "gradient", results.gradients[name])
    for number, step in enumerate(trained.steps if trained else (), start=1):
        _put_step(recorder, number, step, subject, results.parameters)
    if trained:
        recording.trajectory = trained.trajectory


def _put_step(recorder: Recorder, number: int, step: OptimizerStep, subject: Subject, used: Sequence[str]) -> None:
    """Record what the optimiser did in one step. Names and kinds of the first step differ from those of later ones."""
    first = number == 1

    def put(kind: Kind, name: str, values: np.ndarray, dtype: str | None = None) -> None:
        label = name if first else f"step {number} {name}"
        recorder.put(label, kind if first else "second step", values, dtype)

    order = backward_order(model_of(subject), step.gradients, used)
    for name in order:
        put("training gradient", f"{'training gradient' if first else 'gradient'}:{name}", step.gradients[name])
    for moment in (moment for kept in MOMENTS.values() for moment in kept):
        for name in order:
            if f"{moment}.{name}" in step.moments:
                put("moment", f"{moment}:{name}", step.moments[f"{moment}.{name}"])
    for name, (update, dtype) in step.updates.items():
        put("update", f"update:{name}", update, dtype)
    for name, value in step.state.items():
        put("state", f"state:{name}", value)


def _put_terms(recorder: Recorder, ops: Ops, terms: LossTerms) -> None:
    """Record losses and counts of a pass that shows nothing else."""
    for kind, names in (("loss", LOSSES), ("plan", COUNTS)):
        for name in names:
            recorder.put(f"model:{name}", cast(Kind, kind), ops.to_numpy(getattr(terms, name)))
