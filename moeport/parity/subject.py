"""Subjects of recordings: variants of a config, with weights and data, on a backend and its ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import Backend
from moeport.comm.exchange import EXCHANGES
from moeport.comm.mesh import Mesh, single_mesh
from moeport.config import load_config
from moeport.config.schema import Config
from moeport.core.parameters import initial_parameters
from moeport.data import Examples
from moeport.data.denoising import Denoising
from moeport.errors import UserError
from moeport.facts import BACKENDS
from moeport.model.batch import Batch
from moeport.model.transformer import Transformer
from moeport.training.batches import Batches
from moeport.training.checkpoint import find_checkpoint, open_checkpoint
from moeport.training.fits import check_parameters
from moeport.training.ranks import check_ranks
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.task import build_task_in_turn

DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}
"""Short names of compute types; the long ones are accepted, too."""
TARGET = re.compile(r"([a-z_]+)(?:-([^:@]+))?(?::(\w+))?(?:@(?:(\d+)x)?(\d+))?")
"""`BACKEND[-DEVICE][:DTYPE][@RANKS]`, with ranks as N or as NODESxN."""


@dataclass(frozen=True)
class Variant:
    """A variant as the user wrote it, such as `torch-cpu:bf16@2x4 backend.compile=true`."""

    backend: str
    device: str
    dtype: str
    nodes: int
    ranks_per_node: int
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, spec: str) -> Variant:
        """`BACKEND[-DEVICE][:DTYPE][@[NODESx]RANKS] [KEY=VALUE ...]`.

        Unless named, the device is the CPU, the type is float32 and the only rank is this process.

        Raises UserError for any other text.
        """
        target, *overrides = spec.split() or [""]
        match = TARGET.fullmatch(target)
        backend, device, dtype, nodes, ranks = match.groups() if match else ("", None, "", None, None)
        dtype = DTYPES.get(dtype or "fp32", dtype or "")
        if backend not in BACKENDS or dtype not in DTYPES.values() or "0" in (nodes, ranks):
            raise UserError(
                f"variant {spec!r}: expected BACKEND[-DEVICE][:DTYPE][@RANKS] and then KEY=VALUE, with a backend of "
                f"{', '.join(BACKENDS)} and a type of {', '.join(DTYPES)}; such as "
                "'torch-cpu:bf16 backend.compile=true' or 'torch-cpu@4 parallelism.expert=4'"
            )
        return cls(backend, device or "cpu", dtype, int(nodes or 1), int(ranks or 1), tuple(overrides))

    @property
    def ranks(self) -> int:
        """Number of processes that compute it."""
        return self.nodes * self.ranks_per_node

    @property
    def config_overrides(self) -> list[str]:
        """The overrides of the config that it stands for."""
        names = {"name": self.backend, "device": self.device, "dtype": self.dtype}
        return [*(f"backend.{key}={value}" for key, value in names.items()), *self.overrides]


@dataclass(frozen=True)
class Size:
    """How much to compute."""

    sequences: int = 2
    """Sequences per batch."""
    tokens: int = 64
    """Tokens per sequence of text; images are always whole."""
    steps: int = 5
    """Number of optimiser steps in the trajectory; may be 0."""
    micro_batches: int = 1
    """Equal parts of the batch, computed one after another; each of n ranks computes an n-th of them."""


def size_for(
    variants: Sequence[Variant],
    sequences: int | None = None,
    tokens: int = 64,
    steps: int = 5,
    micro_batches: int | None = None,
) -> Size:
    """A size that all variants can compute; takes the values of `moeport.parity.options.Amount`.

    Args:
        variants: the variants to be compared.
        sequences: sequences per batch; None: 2, or the number of micro-batches.
        tokens: see Size.
        steps: see Size.
        micro_batches: their number; None: the smallest that divides among the ranks of every variant.
    """
    parts = micro_batches or math.lcm(*(variant.ranks for variant in variants))
    return Size(sequences or max(2, parts), tokens, steps, parts)


@dataclass(frozen=True)
class Subject:
    """A variant, ready to be recorded."""

    name: str
    """As the user wrote it."""
    config: Config
    backend: Backend
    params: Mapping[str, np.ndarray]
    """Whole weights by name, float32."""
    train: Examples
    """Training tokens in sequences of the config's length, or images."""
    vocab_size: int
    mesh: Mesh
    """The ranks that compute it together, of which this process is one."""
    first_token: int | None = None
    """As of `moeport.training.task.Task`."""
    denoising: Denoising | None = None
    """As of `moeport.training.task.Task`."""

    @property
    def opaque_blocks(self) -> bool:
        """Whether blocks must be left alone, because the backend compiles or recomputes them."""
        return self.config.backend.compile or self.config.training.activation_checkpointing

    @property
    def all_to_all(self) -> tuple[str, int]:
        """Algorithm and number of chunks; `variant_config` refuses auto for both if they are used."""
        comm = self.config.comm
        return comm.algorithm, cast(int, comm.chunks)

    @property
    def num_parts(self) -> int:
        """Micro-batches of the batch, over all ranks."""
        return self.config.training.gradient_accumulation * self.mesh.world.size

    def micro_batches(self, lm: Transformer) -> list[Batch]:
        """This rank's micro-batches of the first step."""
        return list(self.batches(lm).of_step(0))

    def batches(self, lm: Transformer) -> Batches:
        """The batches that the trainer trains on."""
        return Batches(self.config.training, lm, self.train, self.mesh.world, self.first_token, self.denoising)


def build_subject(
    file: Path | None,
    spec: str,
    overrides: Sequence[str] = (),
    *,
    size: Size | None = None,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Subject:
    """Load a variant for this process only: config, backend, weights, data.

    Args:
        file: the YAML config; None to use only the defaults.
        spec: the variant, see `Variant.parse`.
        overrides: `KEY=VALUE` for all variants.
        size: how much to compute.
        checkpoint: a run folder, for its newest checkpoint, or one of its `step-*` folders; default: the initial
            weights.
        report: is given a sentence on what is being done.
    """
    config = variant_config(file, Variant.parse(spec), overrides, size or Size())
    backend = get_backend(config.backend)
    return subject_on(spec, config, backend, single_mesh(backend.ops), checkpoint, report)


def variant_config(file: Path | None, variant: Variant, overrides: Sequence[str], size: Size, ranks: int = 1) -> Config:
    """The config of a variant, cut to a size.

    Args:
        file: as in `build_subject`.
        variant: the variant; its number of ranks does not matter here.
        overrides: as in `build_subject`.
        size: size of the batch.
        ranks: number of processes that share the batch.

    Raises UserError for sizes that do not divide, and for an all-to-all that would be chosen at run time.
    """
    if size.micro_batches % ranks:
        raise UserError(
            f"--micro-batches: {size.micro_batches} do not divide among {ranks} ranks; expected a multiple of {ranks}"
        )
    if size.sequences % size.micro_batches:
        raise UserError(
            f"--sequences: {size.sequences} do not divide among {size.micro_batches} micro-batches (--micro-batches, "
            f"or the ranks of all variants); expected a multiple of {size.micro_batches}"
        )
    cut = [
        f"training.batch_size={size.sequences}",
        f"training.gradient_accumulation={size.micro_batches // ranks}",
        "training.evaluation_batch_size=null",
    ]
    config = load_config(file, [*overrides, *cut, *variant.config_overrides])
    if not config.data.is_images:
        cut.append(f"data.sequence_length={size.tokens}")
        config = load_config(file, [*overrides, *cut, *variant.config_overrides])
    if ranks > 1:
        check_ranks(config, ranks)
        if config.parallelism.expert > 1 and config.comm.algorithm == "auto":
            raise UserError(
                "comm.algorithm: auto may choose another algorithm each time; expected one of "
                f"{', '.join(EXCHANGES)}, as in --set comm.algorithm=flat"
            )
        if config.parallelism.expert > 1 and config.comm.chunks == "auto":
            raise UserError(
                "comm.chunks: auto may choose another number each time; expected a number, as in --set comm.chunks=1"
            )
    return config


def checkpoint_path(named: Path) -> Path:
    """The checkpoint that the user names: itself, or the latest of a run folder."""
    is_run = (named / CHECKPOINT_DIR).is_dir()
    return find_checkpoint(named / CHECKPOINT_DIR, "latest") if is_run else named


def subject_on(
    name: str,
    config: Config,
    backend: Backend,
    mesh: Mesh,
    checkpoint: Path | None,
    report: Callable[[str], None],
) -> Subject:
    """A variant with its weights and data on the ranks of a mesh. `checkpoint` and `report` as in `build_subject`."""
    task = build_task_in_turn(config, mesh.world, report=report)
    specs = task.model().parameter_specs()
    if checkpoint is None:
        params: Mapping[str, np.ndarray] = initial_parameters(specs, config.training.seed, task.token_counts)
    else:
        loaded = open_checkpoint(checkpoint_path(checkpoint))
        check_parameters(loaded, specs)
        params = loaded.model
    return Subject(name, config, backend, params, task.train, task.vocab_size, mesh, task.first_token, task.denoising)
