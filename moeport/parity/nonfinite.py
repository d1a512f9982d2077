"""The first tensor of a subject with a NaN or an infinity, found by one more pass in which every entry is looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.finite import FORWARD, PLACES, STEPPED, NonFinite, non_finite_in
from moeport.parity.parts import gather_bytes, split
from moeport.parity.passes import backward_order, differentiate, divide, recorded_model_of
from moeport.parity.recorder import Recorder
from moeport.parity.recording import Kind, Recording, TensorRecord
from moeport.parity.steps import Trained
from moeport.parity.subject import Subject


def find_first(
    subject: Subject, recording: Recording, trained: Trained | None, replayed: Mapping[str, np.ndarray]
) -> str | None:
    """A sentence on the first tensor that is not finite; None if all are. Every rank calls it.

    Args:
        subject: the subject.
        recording: what was recorded of it.
        trained: its optimiser steps.
        replayed: decisions that the pass followed.
    """
    found = _search_parameters(subject.params, "") or _first_kept(subject, recording, trained, replayed)
    stopped = trained.stopped if trained else None
    if not found and stopped:
        made = f"made by optimiser step {stopped.updates}" if stopped.updates else ""
        found = _search_parameters(stopped.parameters, made)
        found = found or _search(subject, stopped.parameters, stopped.step, {})
    if found or not stopped:
        return str(found) if found else None
    return f"loss or gradient norm of step {stopped.step + 1}; everything in an eager pass of it is finite"


def _first_kept(
    subject: Subject, recording: Recording, trained: Trained | None, replayed: Mapping[str, np.ndarray]
) -> NonFinite | None:
    """What the records show; the pass is run once more if they were not kept whole."""
    kept = next(filter(None, map(non_finite_in, recording.tensors.values())), None)
    if kept is None:
        return None
    named = replace(kept, place=PLACES.get(kept.kind, FORWARD))
    if all(record.keep == "full" for record in recording.tensors.values()):
        return named
    if kept.kind not in STEPPED:
        return _search(subject, subject.params, 0, replayed) or named
    owner = kept.name.partition(":")[2]
    step = trained.steps[0] if trained and trained.steps else None
    arrays = step.gradients if step and kept.kind == "training gradient" else {}
    if step and kept.kind == "update":
        arrays = {name: update for name, (update, _) in step.updates.items()}
    whole = arrays.get(owner)
    if whole is None:
        return named
    exact = non_finite_in(TensorRecord(kept.name, kept.kind, str(whole.dtype), whole.shape, values=whole))
    return replace(exact, place=named.place) if exact else named


class _Finder(Recorder):
    """A recorder that keeps only the first tensor that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.found: NonFinite | None = None
        self.place = ""
        self._looked = 0

    def store(
        self,
        ops: Ops,
        name: str,
        kind: Kind,
        array: Array,
        op: str | None,
        inputs: tuple[str, ...],
        dtype: str | None = None,
    ) -> None:
        """Look at a tensor of the pass."""
        inner = ops.unrecorded()
        values = np.asarray(inner.to_numpy(array))
        self.put_record(TensorRecord(name, kind, inner.dtype(array), values.shape, op=op, values=values))

    def put_record(self, record: TensorRecord) -> None:
        """Look at a tensor of the host."""
        self._looked += 1
        if self.found is None and (found := non_finite_in(record)):
            self.found = replace(found, order=self._looked, place=self.place)


def _search_parameters(params: Mapping[str, np.ndarray], place: str) -> NonFinite | None:
    finder = _Finder()
    finder.place = place
    for name, value in params.items():
        finder.put(f"parameter:{name}", "parameter", value)
    return finder.found


def _search(
    subject: Subject, params: Mapping[str, np.ndarray], step: int, replayed: Mapping[str, np.ndarray]
) -> NonFinite | None:
    """Run the passes of a step, counted from 0, with these parameters."""
    if found := _search_parameters(params, ""):
        return found
    at, finder, scratch = replace(subject, params=params), _Finder(), Recording(subject.name, subject.backend.dtype)
    lm = recorded_model_of(at, finder)
    if subject.num_parts > 1:
        divide(at, lm)
    pieces = {name: split(values, subject.num_parts) for name, values in replayed.items()}
    accumulation = subject.config.training.gradient_accumulation
    for part, batch in enumerate(at.batches(lm).of_step(step), start=subject.mesh.world.rank * accumulation):
        finder.place = f"forward pass of step {step + 1}"
        finder.follow({name: piece[part] for name, piece in pieces.items()})
        gradients = differentiate(at, lm, batch, scratch)
        finder.place = f"backward pass of step {step + 1}"
        for name in backward_order(lm, gradients, finder.parameters):
            finder.put(f"gradient:{name}", "gradient", gradients[name])
        finder.take()
    return _first_of_ranks(subject, finder.found)


def _first_of_ranks(subject: Subject, found: NonFinite | None) -> NonFinite | None:
    """The earliest of what the ranks have found."""
    world = subject.mesh.world
    if world.size == 1:
        return found
    texts = gather_bytes(world, json.dumps(asdict(found) if found else None).encode())
    every = [(rank, NonFinite(**json.loads(text))) for rank, text in enumerate(texts) if text != b"null"]
    if not every:
        return None
    rank, first = min(every, key=lambda pair: pair[1].order)
    return replace(first, place=f"{first.place} on rank {rank}")
