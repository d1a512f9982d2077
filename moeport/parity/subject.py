"""What is recorded: a variant of a config, with weights and text, on a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from moeport.backends import BACKENDS, get_backend
from moeport.backends.base import Backend, TrainingModel, TrainingOptions
from moeport.config import load_config
from moeport.config.schema import Config
from moeport.core.build import build_model
from moeport.core.model import Batch, LossTerms, Transformer
from moeport.core.ops import Array, Ops
from moeport.core.parameters import initial_parameters
from moeport.data import Examples
from moeport.errors import BackendUnavailableError, UserError
from moeport.parity.model import COUNTS, LOSSES, recorded_model
from moeport.parity.recorder import Recorder
from moeport.parity.recording import SAMPLE_SIZE, Keep, Kind, Recording, Step, environment
from moeport.training.checkpoint import check_parameters, find_checkpoint, load_checkpoint
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.task import build_task
from moeport.training.trainer import Trainer

DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}
"""Short names of compute types; the long ones are understood too."""


@dataclass(frozen=True)
class Subject:
    """A variant, ready to be recorded."""

    name: str
    """As the user wrote it."""
    config: Config
    backend: Backend
    params: Mapping[str, np.ndarray]
    """Weights by name, float32."""
    train: Examples
    """Training tokens, cut into sequences of the config's length, or images."""
    vocab_size: int

    @property
    def opaque_blocks(self) -> bool:
        """Whether blocks must be left alone, because the backend compiles or recomputes them."""
        return self.config.backend.compile or self.config.training.activation_checkpointing


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    sequences: int = 2
    """Sequences a batch."""
    tokens: int = 64
    """Tokens a sequence of text; images are whole."""
    steps: int = 5
    """Optimiser steps of the trajectory; 0: none."""


def variant_overrides(spec: str) -> list[str]:
    """Overrides of a config that a variant stands for.

    `BACKEND[-DEVICE][:DTYPE] [KEY=VALUE ...]`, such as `torch-cpu:bf16` or `torch-cpu backend.compile=true`. The device
    is the CPU and the type float32 unless named.

    Raises UserError for what does not read so.
    """
    target, *overrides = spec.split() or [""]
    place, _, dtype = target.partition(":")
    backend, _, device = place.partition("-")
    dtype = DTYPES.get(dtype or "fp32", dtype)
    if backend not in BACKENDS or dtype not in DTYPES.values():
        raise UserError(
            f"variant {spec!r}: expected BACKEND[-DEVICE][:DTYPE] and then KEY=VALUE, with a backend of "
            f"{', '.join(BACKENDS)} and a type of {', '.join(DTYPES)}; such as 'torch-cpu:bf16 backend.compile=true'"
        )
    return [f"backend.name={backend}", f"backend.device={device or 'cpu'}", f"backend.dtype={dtype}", *overrides]


def build_subject(
    file: Path | None,
    spec: str,
    overrides: Sequence[str] = (),
    *,
    size: Size | None = None,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Subject:
    """Load a variant: config, backend, weights, data.

    Args:
        file: the YAML config; None for the defaults alone.
        spec: the variant, see `variant_overrides`.
        overrides: `KEY=VALUE` for all variants.
        size: cuts the batch; None leaves the config's.
        checkpoint: a run folder, its newest checkpoint, or one `step-*` folder of it; default: the initial weights.
        report: takes a sentence on what is being done.
    """
    size = size or Size()
    cut = [
        f"training.batch_size={size.sequences}",
        "training.gradient_accumulation=1",
        "training.evaluation_batch_size=null",
    ]
    config = load_config(file, [*overrides, *cut, *variant_overrides(spec)])
    if not config.data.is_images:
        cut.append(f"data.sequence_length={size.tokens}")
        config = load_config(file, [*overrides, *cut, *variant_overrides(spec)])
    task = build_task(config, report=report)
    specs = task.model().parameter_specs()
    if checkpoint is None:
        params = initial_parameters(specs, config.training.seed, task.token_counts)
    else:
        is_run = (checkpoint / CHECKPOINT_DIR).is_dir()
        path = find_checkpoint(checkpoint / CHECKPOINT_DIR, "latest") if is_run else checkpoint
        loaded = load_checkpoint(path)
        check_parameters(loaded, specs)
        params = loaded.model
    return Subject(spec, config, get_backend(config.backend), params, task.train, task.vocab_size)


def record(
    subject: Subject,
    *,
    steps: int = 5,
    keep: Mapping[str, Keep] | None = None,
    replay: Recording | None = None,
    sample_size: int = SAMPLE_SIZE,
) -> Recording:
    """Record a forward and backward pass, and some optimiser steps.

    Args:
        subject: what to record.
        steps: optimiser steps of the trajectory, the first with its gradients and updates; 0: none.
        keep: how much of each kind is kept; default all.
        replay: take every routing decision of the pass from this recording; needs its decisions whole.
        sample_size: entries of a sampled tensor.
    """
    backend = subject.backend
    recorder = Recorder(keep, decisions(replay) if replay else None, sample_size)
    recording = Recording(
        name=subject.name,
        dtype=backend.dtype,
        config=subject.config.model_dump(mode="json"),
        environment=environment(backend.name, backend.device, backend.versions(), backend.kernel_choices()),
        replayed=replay.name if replay else None,
        sample_size=sample_size,
    )
    for name, value in subject.params.items():
        recorder.put(f"parameter:{name}", "parameter", value)
    if subject.opaque_blocks:
        recording.trajectory = _train(subject, recorder, steps, record_forward=True)
        if any(tensor.kind == "activation" for tensor in recorder.tensors.values()):
            recording.notes.append("inside of blocks not recorded: they are compiled or recomputed")
        else:
            recording.notes.append("inside of blocks and their outputs not recorded: the pass is one compiled graph")
    else:
        _differentiate(subject, recorder, recording)
        if steps:
            recording.trajectory = _train(subject, recorder, steps, record_forward=False)
    if steps and not recording.trajectory:
        recording.notes.append(f"not trained: {backend.name} does not train")
    recording.tensors = recorder.finish()
    return recording


def forward(subject: Subject, recorder: Recorder) -> None:
    """One forward pass under a recorder of one's own; no gradients."""
    loss, params = _loss(subject, recorder)
    loss(params)
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


def _loss(subject: Subject, recorder: Recorder) -> tuple[Callable[[Mapping[str, Array]], Array], dict[str, Array]]:
    """The training loss of the first batch as a function of the parameters, and those on the device."""
    backend, ops, config = subject.backend, subject.backend.ops, subject.config
    lm = recorded_model(config.model, config.data, subject.vocab_size, recorder)
    batch = _first_batch(subject, lm)
    noise = {name: ops.from_numpy(u) for name, u in batch.noise.items()}
    placed = Batch(ops.from_numpy(batch.token_BS), ops.from_numpy(batch.target_BS), noise)
    rope = lm.rope(ops, subject.train.sequence_length, backend.dtype)
    params = {name: ops.from_numpy(x.astype(backend.parameter_dtype)) for name, x in subject.params.items()}

    def loss(arrays: Mapping[str, Array]) -> Array:
        return lm.loss(ops, arrays, placed, rope, backend.dtype, training=True).loss

    return loss, params


def _differentiate(subject: Subject, recorder: Recorder, recording: Recording) -> None:
    """Forward and, where the backend can, backward pass of the first batch."""
    loss, params = _loss(subject, recorder)
    try:
        run = subject.backend.value_and_grad(loss)
    except BackendUnavailableError:
        recording.notes.append(f"not differentiated: {subject.backend.name} has no gradients")
        loss(params)
        return
    _, gradients = run(params)
    _put_gradients(recorder, "gradient", {k: subject.backend.ops.to_numpy(g) for k, g in gradients.items()}, subject)


def _put_gradients(recorder: Recorder, kind: Any, gradients: Mapping[str, np.ndarray], subject: Subject) -> None:
    """Gradients of the trained parameters, from the one used last in the forward pass to the first."""
    lm = build_model(subject.config.model, subject.config.data, subject.vocab_size)
    trained = [spec.name for spec in lm.parameter_specs() if spec.trainable and spec.name in gradients]
    used = [source.removeprefix("parameter:") for source in recorder.parameter_order]
    order = sorted(trained, key=lambda name: used.index(name) if name in used else trained.index(name), reverse=True)
    for name in order:
        recorder.put(f"{kind}:{name}", kind, gradients[name])


def _put_terms(recorder: Recorder, ops: Ops, terms: LossTerms | None) -> None:
    """Losses and counts of a pass that shows nothing else."""
    assert terms
    for kind, names in (("loss", LOSSES), ("plan", COUNTS)):
        for name in names:
            recorder.put(f"model:{name}", cast(Kind, kind), ops.to_numpy(getattr(terms, name)))


def _train(subject: Subject, recorder: Recorder, steps: int, record_forward: bool) -> list[Step]:
    """Optimiser steps by the trainer; the first one's gradients and updates are recorded."""
    backend, config = subject.backend, subject.config
    if not backend.trains:
        return []
    lm = build_model(config.model, config.data, subject.vocab_size)
    if record_forward:
        lm = recorded_model(config.model, config.data, subject.vocab_size, recorder, inside_blocks=False)
    options = TrainingOptions(config.optimizer, config.training.activation_checkpointing, config.backend.compile)
    model = backend.training_model(lm, subject.params, options)
    observed = _Observed(model)
    before = model.parameters()
    trainer = Trainer(config, backend, lm, cast(TrainingModel, observed), subject.train, 0, 1.0)
    trajectory = []
    for number in range(max(steps, 1)):
        metrics = trainer.step()
        recorder.active = False
        if number == 0:
            if record_forward:
                if "model:loss" not in recorder.tensors:
                    _put_terms(recorder, backend.ops, observed.terms_seen)
                _put_gradients(recorder, "gradient", observed.gradients_seen, subject)
            _put_gradients(recorder, "training gradient", observed.gradients_seen, subject)
            after = model.parameters()
            for name, value in after.items():
                update = value.astype(np.float64) - before[name]
                recorder.put(f"update:{name}", "update", update, str(value.dtype))
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
    return trajectory


class _Observed:
    """A training model that shows the loss terms and the gradients of its first step."""

    def __init__(self, model: TrainingModel):
        self._model = model
        self.gradients_seen: dict[str, np.ndarray] = {}
        self.terms_seen: LossTerms | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def accumulate(self, batch: Batch, share: float) -> LossTerms:
        """See TrainingModel."""
        terms = self._model.accumulate(batch, share)
        self.terms_seen = self.terms_seen or terms
        return terms

    def step(self, learning_rate: float, norm: Array) -> None:
        """See TrainingModel."""
        if not self.gradients_seen:
            self.gradients_seen = self._model.gradients()
        self._model.step(learning_rate, norm)


def _first_batch(subject: Subject, lm: Transformer) -> Batch:
    """The batch of the first step, as the trainer draws it; drawing needs no model."""
    model = cast(TrainingModel, None)
    return next(Trainer(subject.config, subject.backend, lm, model, subject.train, 0, 1.0).micro_batches(0))
