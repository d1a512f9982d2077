"""Forward and backward passes of a subject, recorded or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import numpy as np

from moeport.core.array import Array
from moeport.core.weights import read_part
from moeport.errors import BackendUnavailableError
from moeport.model.batch import Batch
from moeport.model.build import build_model
from moeport.model.spread import spread
from moeport.model.transformer import Transformer
from moeport.parity.model import Recorded, RecordedBlock, recorded_model
from moeport.parity.recorder import Recorder
from moeport.parity.recording import NO_GRADIENTS, Recording
from moeport.parity.subject import Subject


def model_of(subject: Subject) -> Transformer:
    """The model, not recorded."""
    return build_model(subject.config.model, subject.config.data, subject.vocab_size)


def recorded_model_of(subject: Subject, recorder: Recorder, inside_blocks: bool = True) -> Recorded:
    """The model under a recorder."""
    return recorded_model(subject.config.model, subject.config.data, subject.vocab_size, recorder, inside_blocks)


def divide(subject: Subject, lm: Recorded) -> None:
    """Prepare a model for a batch in micro-batches: this rank's experts, which are recorded from outside."""
    spread(lm, subject.mesh, *subject.all_to_all)
    outside_experts(subject, lm)


def outside_experts(subject: Subject, lm: Recorded) -> None:
    """Record this rank's experts from outside."""
    mesh = subject.mesh
    first_expert = mesh.experts.rank * subject.config.model.moe.num_experts // mesh.experts.size
    for block in lm.blocks:
        cast(RecordedBlock, block).record_experts_from_outside(first_expert)


def backward_order(lm: Transformer, gradients: Collection[str], used: Sequence[str]) -> list[str]:
    """Names of gradients, from the parameter used last in the forward pass to the first.

    Args:
        lm: the model.
        gradients: names of parameters that have a gradient.
        used: names of parameters in the order of their first use.
    """
    trained = [spec.name for spec in lm.parameter_specs() if spec.trainable and spec.name in gradients]
    return sorted(trained, key=lambda name: used.index(name) if name in used else trained.index(name), reverse=True)


def forward(subject: Subject, recorder: Recorder) -> None:
    """Run one forward pass under its own recorder, without gradients."""
    lm = recorded_model_of(subject, recorder)
    _loss(subject, lm, subject.micro_batches(lm)[0])(_placed(subject, lm))
    recorder.finish()


def _placed(subject: Subject, lm: Transformer) -> dict[str, Array]:
    """This rank's parameters on the device."""
    backend = subject.backend
    local = {spec.name: read_part(subject.params, spec.name, subject.mesh.box(spec)) for spec in lm.parameter_specs()}
    return {name: backend.ops.from_numpy(x.astype(backend.parameter_dtype)) for name, x in local.items()}


def _loss(subject: Subject, lm: Transformer, batch: Batch) -> Callable[[Mapping[str, Array]], Array]:
    """The training loss of a micro-batch as a function of the parameters."""
    ops, dtype = subject.backend.ops, subject.backend.dtype
    placed = batch.mapped(ops.from_numpy)
    run = lm.forward_pass(ops, subject.train.sequence_length, dtype, training=True)

    def loss(arrays: Mapping[str, Array]) -> Array:
        return lm.loss(run, arrays, placed).loss

    return loss


def differentiate(subject: Subject, lm: Transformer, batch: Batch, recording: Recording) -> dict[str, np.ndarray]:
    """Run forward and backward pass of a micro-batch, or only the forward pass if the backend has no gradients."""
    loss, params = _loss(subject, lm, batch), _placed(subject, lm)
    try:
        run = subject.backend.value_and_grad(loss)
    except BackendUnavailableError:
        note = f"{NO_GRADIENTS}{subject.backend.name} has no gradients"
        recording.notes += [note] if note not in recording.notes else []
        loss(params)
        return {}
    _, gradients = run(params)
    return {name: subject.backend.ops.to_numpy(gradient) for name, gradient in gradients.items()}


def over_ranks(subject: Subject, lm: Transformer, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole gradients of the mean loss over all micro-batches, from this rank's sums over its own micro-batches.

    The gradients of an expert already include those of other ranks' tokens, which came through the exchange.
    """
    mesh, kind, whole = subject.mesh, subject.backend.parameter_dtype, {}
    for spec in lm.parameter_specs():
        if spec.trainable and spec.name in sums:
            ranks = mesh.copies if spec.is_expert else mesh.world
            total = ranks.sum_of_numbers(sums[spec.name]) / subject.num_parts
            whole[spec.name] = mesh.whole(spec, total.astype(kind))
    return whole
