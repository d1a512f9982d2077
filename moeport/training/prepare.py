"""Turns a config into a run that is ready for its next step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeport.backends.base import Backend
from moeport.comm.mesh import Mesh
from moeport.comm.start import check_start
from moeport.config.schema import Config
from moeport.core.parameters import InitialWeights, ParameterSpec
from moeport.errors import CheckpointError
from moeport.launch.machine import share_of_cores
from moeport.model.auto_exchange import fastest
from moeport.model.build import build_model
from moeport.model.planned import Planned
from moeport.model.transformer import Transformer
from moeport.training.batches import Batches
from moeport.training.checkpoint import Checkpoint
from moeport.training.fits import check_optimizer, check_parameters
from moeport.training.host_memory import Room, check_memory, memory_line, rank_memory
from moeport.training.placed import place_model
from moeport.training.resumable import announced, check_dealing, check_resumable
from moeport.training.resume import telling_way_back
from moeport.training.routing_counts import RoutingCounts, watched
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.start_from import origin, starting_checkpoint
from moeport.training.task import Task, build_task_in_turn
from moeport.training.trainer import Trainer

BYTES = 257
"""Size of a vocabulary of bytes and the end of text."""
Say = Callable[[str], None]
"""Prints one plain line."""


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready for its next step; each rank has its own."""

    config: Config
    """The whole config; `backend.dtype` is the compute type in use."""
    backend: Backend
    mesh: Mesh
    checkpoint: Checkpoint | None
    """The checkpoint it resumes from; None for a new run."""
    task: Task
    trainer: Trainer
    memory: str
    """What a rank needs, as it was estimated."""
    origin: dict[str, Any] | None
    """As in `CheckpointMeta`."""

    @property
    def dir(self) -> Path:
        """The run folder."""
        return self.config.run.dir

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.dir / CHECKPOINT_DIR

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files."""
        return self.mesh.world.rank == 0

    @property
    def start_step(self) -> int:
        """Number of steps already done."""
        return self.checkpoint.meta.step if self.checkpoint else 0

    @property
    def is_unfinished(self) -> bool:
        """Whether there are steps to do."""
        return self.start_step < self.config.training.steps


def prepare(config: Config, checkpoint: Checkpoint | None, backend: Backend, mesh: Mesh, say: Say) -> PreparedRun:
    """Check the ranks, read the data, build the model and its trainer; every rank calls it.

    Args:
        config: the whole config.
        checkpoint: the checkpoint to resume from; None: start from the initial weights.
        backend: where it runs.
        mesh: the ranks that train together.
        say: prints a line on what is being done.

    Raises UserError, CheckpointError or DataError for errors that the user can fix.
    """
    check_communication(backend, mesh, say)
    config = with_dtype(config, backend.dtype)
    task = build_task_in_turn(config, mesh.world, report=say)
    shapes = task.model()
    batches = Batches(config.training, shapes, task.train, mesh.world, task.first_token, task.denoising)
    for line in batches.dealing.described() if batches.dealing else ():
        say(line)
    here = mesh.world.nodes.count(mesh.world.nodes[mesh.world.rank])
    micro_batch, specs = config.training.batch_size // batches.num_parts, shapes.parameter_specs()
    room = Room(here, *_device_memory(backend))
    check_memory(config, specs, micro_batch, mesh.world.size, room)
    needed = rank_memory(config, specs, micro_batch, mesh.world.size)
    memory = memory_line(needed, room)
    if not room.holds(needed):
        say(f"memory      {memory}")
    counts = routing_counts(config, task, shapes)
    all_to_all = _all_to_all(config, backend, mesh, batches, say)
    start = _start(config, task, specs) if checkpoint is None else None
    params = _params(config, checkpoint, start, task, shapes, share_of_cores(here), say)
    start_step = checkpoint.meta.step if checkpoint else 0
    if checkpoint and batches.dealing:
        check_dealing(checkpoint, batches.dealing)
    with telling_way_back(config) if checkpoint else nullcontext():
        placed = place_model(config, backend, shapes, params, mesh, all_to_all)
        if checkpoint:
            placed.arrays.load_optimizer_state(checkpoint.optimizer, config.training.updates(start_step))
    trainer = Trainer(config, placed, batches, start_step, _peak_flops(config, backend), counts)
    before = checkpoint.meta.origin if checkpoint else origin(config, start) if start else None
    return PreparedRun(config, backend, mesh, checkpoint, task, trainer, memory, before)


def routing_counts(config: Config, task: Task, shapes: Transformer) -> RoutingCounts | None:
    """What counts the routers' choices, which the model then keeps; None if nothing is to be counted.

    Nothing is where the config says so, for data without vocabulary ids, and for `soft`, which makes no choices.
    """
    moe, interval, layers = config.model.moe, config.metrics.routing_interval, len(shapes.moe_layers)
    if not interval or not layers or moe.router.name == "soft":
        return None
    ids = task.frequent_ids(watched(layers, moe.num_experts))
    if not ids:
        return None
    shapes.keeps_choices = True
    return RoutingCounts(ids, layers, moe.num_experts, interval)


def planned(config: Config, ranks: int) -> Planned:
    """What will be trained, before the data are read: with the size of vocabulary that was asked for, if any was."""
    vocab_size = getattr(config.data.tokenizer, "vocab_size", BYTES)
    batch_size = max(1, config.training.batch_size // (config.training.gradient_accumulation * ranks))
    return Planned(build_model(config.model, config.data, vocab_size), batch_size, config.data.tokens_per_sequence)


def _device_memory(backend: Backend) -> tuple[bool, float | None]:
    """Whether a CPU computes, and the bytes of the accelerator if there is one that says."""
    if backend.device.startswith("cpu"):
        return True, None
    return False, next((size for _, size in backend.accelerators()), None)


def with_dtype(config: Config, dtype: str) -> Config:
    """The config with another compute type."""
    return config.model_copy(update={"backend": config.backend.model_copy(update={"dtype": dtype})})


def check_communication(backend: Backend, mesh: Mesh, say: Say) -> None:
    """Check the values of every collective in every type in use; every rank calls it before it computes.

    A line says so if an all-to-all that is wrong is replaced.

    Raises RunError for a wrong value.
    """
    dtypes = dict.fromkeys([backend.dtype, backend.parameter_dtype, "float32", "index"])
    said = check_start(mesh.world, list(dtypes), backend.value_and_grad, backend.versions(), [mesh.experts])
    if said:
        say(f"all-to-all  {said}")


def _all_to_all(config: Config, backend: Backend, mesh: Mesh, batches: Batches, say: Say) -> tuple[str, int]:
    """Algorithm and number of chunks: those of the config, or the fastest ones if the config leaves them open."""
    comm, moe = config.comm, config.model.moe
    if comm.algorithm != "auto" and comm.chunks != "auto":
        return comm.algorithm, comm.chunks
    tokens = config.training.batch_size // batches.num_parts * batches.examples.sequence_length
    top_k = min(-(-moe.router.assignments(tokens, moe.num_experts, 1) // tokens), moe.num_experts)
    choice = fastest(mesh, config, tokens, top_k, backend.dtype, backend.value_and_grad)
    say(f"all-to-all  {choice}")
    return choice.algorithm, choice.chunks


def _start(config: Config, task: Task, specs: list[ParameterSpec]) -> Checkpoint | None:
    """The checkpoint whose weights a new run starts from; None for initial weights."""
    path = config.training.start_from
    return None if path is None else starting_checkpoint(path, specs, task.tokenizer_fingerprint)


def _params(
    config: Config,
    checkpoint: Checkpoint | None,
    start: Checkpoint | None,
    task: Task,
    shapes: Transformer,
    threads: int,
    say: Say,
) -> Mapping[str, np.ndarray]:
    """Parameters by name: the initial ones, drawn by `threads` threads as they are read, those of a run to start from,
    or those of a checkpoint that the run can resume exactly.
    """
    specs = shapes.parameter_specs()
    if start is not None:
        return start.model
    if checkpoint is None:
        return InitialWeights(specs, config.training.seed, task.token_counts, threads)
    if not checkpoint.meta.data:
        raise CheckpointError(
            f"{checkpoint.path}: holds converted weights and no training that could be resumed; start a run from them "
            f"with --set training.start_from={config.run.dir} --set run.dir=FOLDER, without --resume"
        )
    for line in announced(check_resumable(config, checkpoint), checkpoint.meta.step, config.training.steps):
        say(line)
    check_parameters(checkpoint, specs)
    check_optimizer(checkpoint, specs, config.training.updates(checkpoint.meta.step), config.optimizer.name)
    meta = checkpoint.meta
    if (meta.tokenizer, meta.data) != (task.tokenizer_fingerprint, task.train.fingerprint):
        raise CheckpointError(
            f"{checkpoint.path}: was trained on other {task.kind} than the config's source provides now, so "
            f"the run cannot be resumed exactly; restore {task.remedy}, or start another run with "
            "--set run.dir=FOLDER"
        )
    return checkpoint.model


def _peak_flops(config: Config, backend: Backend) -> float:
    """FLOP/s of one rank's device that the MFU refers to."""
    flops = config.metrics.peak_tflops
    return flops * 1e12 if flops else backend.matmul_flops_per_second()
