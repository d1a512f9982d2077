"""How a subject is recorded: a forward and a backward pass of the first batch, and some optimiser steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from moeport.backends.base import TrainingModel
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.errors import BackendUnavailableError, UserError
from moeport.model.batch import Batch
from moeport.model.build import build_model
from moeport.model.loss_terms import LossTerms
from moeport.model.spread import spread
from moeport.model.transformer import Transformer
from moeport.parity.exchange import NOTE
from moeport.parity.model import COUNTS, LOSSES, Recorded, RecordedBlock, recorded_model
from moeport.parity.parts import Part, gather, join, split
from moeport.parity.recorder import Recorder
from moeport.parity.recording import MICRO_BATCHES, SAMPLE_SIZE, Keep, Kind, Recording, Step, environment
from moeport.parity.subject import Subject
from moeport.training.placed import place_model
from moeport.training.trainer import Trainer


def record(
    subject: Subject,
    *,
    steps: int = 5,
    keep: Mapping[str, Keep] | None = None,
    replay: Recording | None = None,
    sample_size: int = SAMPLE_SIZE,
) -> Recording:
    """Record a forward and backward pass, and some optimiser steps.

    Every rank of the subject's mesh calls it and gets the recording of all of them.

    Args:
        subject: what to record.
        steps: optimiser steps of the trajectory, the first with its gradients and updates; 0: none.
        keep: how much of each kind is kept; default all.
        replay: take every routing decision of the pass from this recording; needs its decisions whole.
        sample_size: entries of a sampled tensor.
    """
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
        _record_parts(subject, recorder, recording, steps, replayed)
    else:
        _record_whole(subject, recorder, recording, steps)
    if steps and not recording.trajectory:
        recording.notes.append(f"not trained: {backend.name} does not train")
    recording.tensors = recorder.finish()
    return recording


def forward(subject: Subject, recorder: Recorder) -> None:
    """One forward pass under a recorder of one's own; no gradients."""
    lm = _recorded(subject, recorder)
    _loss(subject, lm, subject.micro_batches(lm)[0])(_placed(subject, lm))
    recorder.finish()


def decisions(recording: Recording) -> dict[str, np.ndarray]:
    """What a replay uses: every decision by name.

    Raises UserError if one is not whole.
    """
    found = {}
    for name, tensor in recording.tensors.items():
        if tensor.kind == "decision":
            if tensor.values is None or tensor.keep != "full":
                raise UserError(
                    f"{recording.name}: {name} is not on record as a whole, so the routing cannot be replayed; "
                    "record with --keep decision=full"
                )
            found[name] = tensor.values
    return found


def _ranks(subject: Subject) -> dict[str, Any]:
    """Who computes it, for the environment."""
    mesh = subject.mesh
    return {
        MICRO_BATCHES: subject.num_parts,
        "ranks": mesh.world.size,
        "nodes": len(set(mesh.world.nodes)),
        "ranks of each copy of the experts": mesh.experts.size,
        "all-to-all": subject.config.comm.algorithm if mesh.experts.size > 1 else "none",
    }


def _record_whole(subject: Subject, recorder: Recorder, recording: Recording, steps: int) -> None:
    """A batch in one piece."""
    if subject.opaque_blocks:
        trained = _train(subject, recorder, _recorded(subject, recorder, inside_blocks=False), steps)
        if trained and "model:loss" not in recorder.tensors:
            _put_terms(recorder, subject.backend.ops, trained.terms[0])
        if any(tensor.kind == "activation" for tensor in recorder.tensors.values()):
            recording.notes.append("inside of blocks not recorded: they are compiled or recomputed")
        else:
            recording.notes.append("inside of blocks and their outputs not recorded: the pass is one compiled graph")
        gradients = trained.gradients if trained else {}
    else:
        lm = _recorded(subject, recorder)
        gradients = _differentiate(subject, lm, subject.micro_batches(lm)[0], recording)
        trained = _train(subject, recorder, _plain(subject), steps) if steps else None
    _put_results(subject, recorder, recording, _Results(gradients, trained, recorder.parameters))


def _record_parts(
    subject: Subject, recorder: Recorder, recording: Recording, steps: int, replayed: Mapping[str, np.ndarray]
) -> None:
    """A batch in micro-batches, of one rank or of several."""
    mesh, inside = subject.mesh, Recorder()
    own: list[Part] = []
    if subject.opaque_blocks:
        trained = _train(subject, recorder, _plain(subject), steps)
        for terms in trained.terms if trained else ():
            _put_terms(inside, subject.backend.ops, terms)
            own.append(inside.take())
        recording.notes.append("inside of blocks and their outputs not recorded: they are compiled or recomputed")
        gradients = trained.gradients if trained else {}
    else:
        lm = _recorded(subject, inside)
        spread(lm, mesh, *subject.all_to_all)
        first_expert = mesh.experts.rank * subject.config.model.moe.num_experts // mesh.experts.size
        for block in lm.blocks:
            cast(RecordedBlock, block).record_experts_from_outside(first_expert)
        pieces = {name: split(values, subject.num_parts) for name, values in replayed.items()}
        batches, sums = subject.micro_batches(lm), dict[str, np.ndarray]()
        for part, batch in enumerate(batches, start=mesh.world.rank * len(batches)):
            inside.follow({name: piece[part] for name, piece in pieces.items()})
            for name, gradient in _differentiate(subject, lm, batch, recording).items():
                sums[name] = sums.get(name, 0.0) + gradient.astype(np.float64)
            own.append(inside.take())
        gradients = _over_ranks(subject, lm, sums)
        trained = _train(subject, recorder, _plain(subject), steps) if steps else None
        recording.notes.append(NOTE)
    for tensor in join(gather(mesh.world, own)).values():
        recorder.put_record(tensor)
    _put_results(subject, recorder, recording, _Results(gradients, trained, inside.parameters))


def _plain(subject: Subject) -> Transformer:
    """The model, not recorded."""
    return build_model(subject.config.model, subject.config.data, subject.vocab_size)


def _recorded(subject: Subject, recorder: Recorder, inside_blocks: bool = True) -> Recorded:
    """The model under a recorder."""
    return recorded_model(subject.config.model, subject.config.data, subject.vocab_size, recorder, inside_blocks)


def _placed(subject: Subject, lm: Transformer) -> dict[str, Array]:
    """The parameters of this rank on the device."""
    backend = subject.backend
    local = {spec.name: subject.mesh.local(spec, subject.params[spec.name]) for spec in lm.parameter_specs()}
    return {name: backend.ops.from_numpy(x.astype(backend.parameter_dtype)) for name, x in local.items()}


def _loss(subject: Subject, lm: Transformer, batch: Batch) -> Callable[[Mapping[str, Array]], Array]:
    """The training loss of a micro-batch as a function of the parameters."""
    ops, dtype = subject.backend.ops, subject.backend.dtype
    noise = {name: ops.from_numpy(u) for name, u in batch.noise.items()}
    placed = Batch(ops.from_numpy(batch.token_BS), ops.from_numpy(batch.target_BS), noise)
    rope = lm.rope(ops, subject.train.sequence_length, dtype)

    def loss(arrays: Mapping[str, Array]) -> Array:
        return lm.loss(ops, arrays, placed, rope, dtype, training=True).loss

    return loss


def _differentiate(subject: Subject, lm: Transformer, batch: Batch, recording: Recording) -> dict[str, np.ndarray]:
    """Forward and backward pass of a micro-batch; only forward, and no gradients, where the backend has none."""
    loss, params = _loss(subject, lm, batch), _placed(subject, lm)
    try:
        run = subject.backend.value_and_grad(loss)
    except BackendUnavailableError:
        note = f"not differentiated: {subject.backend.name} has no gradients"
        recording.notes += [note] if note not in recording.notes else []
        loss(params)
        return {}
    _, gradients = run(params)
    return {name: subject.backend.ops.to_numpy(gradient) for name, gradient in gradients.items()}


def _over_ranks(subject: Subject, lm: Transformer, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole gradients of the mean loss of all micro-batches, from this rank's sums over its own.

    What an expert got from other ranks' tokens came back through the exchange.
    """
    mesh, kind, whole = subject.mesh, subject.backend.parameter_dtype, {}
    for spec in lm.parameter_specs():
        if spec.trainable and spec.name in sums:
            ranks = mesh.copies if spec.is_expert else mesh.world
            total = ranks.sum_of_numbers(sums[spec.name]) / subject.num_parts
            whole[spec.name] = mesh.whole(spec, total.astype(kind))
    return whole


@dataclass
class _Trained:
    """What optimiser steps gave; of the first, this rank's loss terms and whole gradients and updates."""

    terms: list[LossTerms]
    gradients: dict[str, np.ndarray]
    updates: dict[str, tuple[np.ndarray, str]]
    """In float64, with the type of the parameter."""
    trajectory: list[Step]


def _train(subject: Subject, recorder: Recorder, lm: Transformer, steps: int) -> _Trained | None:
    """Optimiser steps by the trainer, the first at least, during which the recorder is active; None if the backend does
    not train.
    """
    backend, config, mesh = subject.backend, subject.config, subject.mesh
    if not backend.trains:
        return None
    placed = place_model(config, backend, lm, subject.params, mesh, subject.all_to_all)
    model = placed.arrays
    observed = _Observed(model)
    before = model.parameters()
    trainer = Trainer(config, replace(placed, arrays=cast(TrainingModel, observed)), subject.batches(lm))
    updates, trajectory = dict[str, tuple[np.ndarray, str]](), []
    for number in range(max(steps, 1)):
        metrics = trainer.step()
        recorder.stop()
        if number == 0:
            updates = {
                name: (value.astype(np.float64) - before[name], str(value.dtype))
                for name, value in model.parameters().items()
            }
        trajectory.append(
            Step(
                step=metrics.step,
                loss=metrics.loss,
                total_loss=metrics.total_loss,
                grad_norm=metrics.grad_norm,
                load_balance=metrics.load_balance,
                router_z=metrics.router_z,
                lr=metrics.lr,
                expert_load=metrics.expert_load,
            )
        )
    return _Trained(observed.terms_seen, observed.gradients_seen, updates, trajectory)


class _Observed:
    """A training model that shows the loss terms and the gradients of its first step."""

    def __init__(self, model: TrainingModel):
        self._model = model
        self.gradients_seen: dict[str, np.ndarray] = {}
        self.terms_seen: list[LossTerms] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        """See TrainingModel."""
        terms = self._model.accumulate(batch, share, is_last)
        if not self.gradients_seen:
            self.terms_seen.append(terms)
        return terms

    def step(self, learning_rate: float, norm: Array) -> None:
        """See TrainingModel."""
        if not self.gradients_seen:
            self.gradients_seen = self._model.gradients()
        self._model.step(learning_rate, norm)


@dataclass(frozen=True)
class _Results:
    """What a recording ends with."""

    gradients: Mapping[str, np.ndarray]
    """Whole, of the loss of the pass."""
    trained: _Trained | None
    parameters: Sequence[str]
    """In the order of their first use."""


def _put_results(subject: Subject, recorder: Recorder, recording: Recording, results: _Results) -> None:
    """Gradients, and what training gave."""
    trained = results.trained
    _put_gradients(recorder, "gradient", results.gradients, subject, results.parameters)
    if trained:
        _put_gradients(recorder, "training gradient", trained.gradients, subject, results.parameters)
        for name, (update, dtype) in trained.updates.items():
            recorder.put(f"update:{name}", "update", update, dtype)
        recording.trajectory = trained.trajectory


def _put_gradients(
    recorder: Recorder, kind: Kind, gradients: Mapping[str, np.ndarray], subject: Subject, used: Sequence[str]
) -> None:
    """Gradients of the trained parameters, from the one used last in the forward pass to the first."""
    specs = _plain(subject).parameter_specs()
    trained = [spec.name for spec in specs if spec.trainable and spec.name in gradients]
    order = sorted(trained, key=lambda name: used.index(name) if name in used else trained.index(name), reverse=True)
    for name in order:
        recorder.put(f"{kind}:{name}", kind, gradients[name])


def _put_terms(recorder: Recorder, ops: Ops, terms: LossTerms) -> None:
    """Losses and counts of a pass that shows nothing else."""
    for kind, names in (("loss", LOSSES), ("plan", COUNTS)):
        for name in names:
            recorder.put(f"model:{name}", cast(Kind, kind), ops.to_numpy(getattr(terms, name)))
