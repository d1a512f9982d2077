"""A folder of torch.distributed.checkpoint (DCP), of moeport or of torchtitan and others, as a run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moeport.backends.dcp import METADATA, read_dcp
from moeport.config import config_from_dict, load_config
from moeport.config.schema import Config
from moeport.convert.dcp_names import (
    ASIDE,
    EMBEDDING,
    STATES,
    TITAN_BIAS,
    TITAN_EMBEDDING,
    Names,
    Ours,
    Piece,
    check_shapes,
    names_in,
    pieces_of,
    specs_of,
)
from moeport.convert.dcp_record import FILE, read_record
from moeport.convert.digested import Digested
from moeport.convert.progress import Report, reported, silent
from moeport.core.moments import moment_names
from moeport.core.weights import Box
from moeport.errors import DataError, UserError
from moeport.training.checkpoint import find_checkpoint, save_streamed
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.run_dir import CHECKPOINT_DIR, TOKENIZER_FILE, refuse_used, write_config
from moeport.training.tensor_file import NewTensor
from moeport.version import VERSION

CODES = {"float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class FromDcp:
    """What was read."""

    checkpoint: Path
    tensors: int
    names: Names
    resumes: bool
    """Whether the run can be resumed where it stopped."""
    notes: tuple[str, ...]
    """What the user should know, a sentence each."""


def from_dcp(source: Path, run_dir: Path, config_file: Path | None = None, report: Report = silent) -> FromDcp:
    """Convert a folder of torch.distributed.checkpoint to a run with one checkpoint.

    Args:
        source: the folder.
        run_dir: the run folder to make.
        config_file: describes the model, for a folder that moeport did not write.
        report: is told of each array that was written.

    Raises:
        BackendUnavailableError: PyTorch is missing.
        UserError: names every tensor that is missing, damaged, unknown, of another shape or not finite (or DataError,
            which is one); nothing is dropped without a note.
    """
    refuse_used(run_dir)
    if not (source / METADATA).is_file():
        raise UserError(f"{source}: has no {METADATA}; expected a folder that torch.distributed.checkpoint wrote")
    job = _Import(source, config_file, run_dir)
    save_streamed(
        run_dir / CHECKPOINT_DIR,
        job.meta,
        reported(job.parameters(), report),
        job.write_others,
        job.moments(),
    )
    write_config(run_dir, job.config)
    path = find_checkpoint(run_dir / CHECKPOINT_DIR, "latest")
    return FromDcp(path, len(job.stored), job.names, job.resumes, job.notes())


class _Import:
    """One folder on its way in: every tensor has a place, or is refused."""

    def __init__(self, source: Path, config_file: Path | None, run_dir: Path):
        self.source, self.record = source, read_record(source)
        stored, self.no_tensors = read_dcp(source)
        self.stored = stored = Digested(stored)
        self.names, prefix, self._state = names_in(stored, self.record)
        self.config, self.meta = self._settings(config_file, run_dir)
        embedding = prefix + (TITAN_EMBEDDING if self.names == "torchtitan" else EMBEDDING)
        if embedding not in stored:
            raise UserError(f"{source}: {embedding} is missing; expected a language model by the names of {self.names}")
        self.specs = specs_of(self.config, stored.shape(embedding)[0], str(source))
        self.pieces = pieces_of(self.names, self.config.model, self.specs)
        self._shapes = {spec.name: spec.shape for spec in self.specs}
        moments_of = moment_names(self.specs, self.config.optimizer.name)
        self._moment_shapes = {name: spec.shape for name, spec in moments_of.items()}
        own = [replace(piece, tensor=prefix + piece.tensor) for piece in self.pieces]
        moments = self._moments()
        check_shapes([*own, *moments], stored, str(source))
        self.left_aside = self._others({piece.tensor for piece in (*own, *moments)}, prefix)
        self.model, self.optimizer = Ours(own, stored), Ours(moments, stored)
        self.resumes = bool(self.meta.data) and bool(self.optimizer or not self.config.training.updates(self.meta.step))
        if not self.resumes:
            start = self.config.training.model_copy(update={"start_from": run_dir})
            self.config = self.config.model_copy(update={"training": start})

    def _settings(self, config_file: Path | None, run_dir: Path) -> tuple[Config, CheckpointMeta]:
        """The config of the run, and the metadata of its checkpoint."""
        if self.record is not None and config_file is None:
            meta = CheckpointMeta(**self.record["meta"])
            config = config_from_dict(
                {**meta.config, "run": {**meta.config["run"], "dir": str(run_dir)}}, recorded=True
            )
            return config, meta
        if config_file is None:
            raise UserError(
                f"{self.source}: has no {FILE}, which moeport writes, so it does not say what model it holds; give a "
                "config whose model section does: --config FILE"
            )
        config = load_config(config_file, [f"run.dir={run_dir}", f"training.start_from={run_dir}"])
        return config, CheckpointMeta(0, 0, None, None, "", config.model_dump(mode="json"), VERSION)

    def _moments(self) -> list[Piece]:
        """The moments, if the run that they belong to is there too, so that it can be continued."""
        if not self.meta.data:
            return []
        wanted = [
            Piece(f"{self._state}{piece.tensor}.{moment}", piece.shape, f"{moment}.{piece.parameter}", piece.box)
            for piece in self.pieces
            for moment in STATES
            if f"{moment}.{piece.parameter}" in self._moment_shapes
        ]
        return wanted if any(piece.tensor in self.stored for piece in wanted) else []

    def _others(self, used: set[str], prefix: str) -> list[str]:
        """Tensors that are not needed, each for a known reason. Raises UserError for one without."""
        tied = self.config.model.tie_embeddings and self.names == "torchtitan"
        left = []
        for name in self.stored:
            if name in used:
                continue
            if name.startswith(ASIDE[self.names]) and (name.endswith(".step") or not self.meta.data):
                left.append(name)
            elif tied and name == "lm_head.weight":
                self._check_tied(name, prefix + TITAN_EMBEDDING)
            elif self.names == "torchtitan" and name.endswith(TITAN_BIAS):
                if np.any(self.stored[name]):
                    raise UserError(f"{self.source}: {name} is not zero: moeport's topk has no expert bias")
            else:
                raise UserError(
                    f"{self.source}: {name} has no place in the model of the config; expected tensors of "
                    f"{self.names} only"
                )
        return left

    def _check_tied(self, name: str, embedding: str) -> None:
        for box in self.stored.bands(name):
            if not np.array_equal(self.stored.read(name, box), self.stored.read(embedding, box)):
                raise UserError(
                    f"{self.source}: {name} is not {embedding}, though the config says tie_embeddings; set it to false"
                )

    def parameters(self) -> list[NewTensor]:
        """The parameters, each read while it is written."""
        return self._tensors(self.model, self._shapes)

    def moments(self) -> list[NewTensor]:
        """The optimiser's state, if it is there."""
        return self._tensors(self.optimizer, self._moment_shapes) if self.optimizer else []

    def _tensors(self, arrays: Ours, shapes: Mapping[str, tuple[int, ...]]) -> list[NewTensor]:
        """The stored arrays, and zeros for the router of a single expert, whose gate is always 1."""
        return [
            NewTensor(name, CODES[arrays.dtype(name)], shape, partial(self._blocks, arrays, name))
            if name in arrays
            else NewTensor(name, "F32", shape, partial(_zeros, shape))
            for name, shape in shapes.items()
        ]

    def _blocks(self, arrays: Ours, name: str) -> Iterator[bytes]:
        for box in self._bands(arrays, name):
            values = arrays.read(name, box)
            if not np.isfinite(values).all():
                raise DataError(f"{self.source}: {name} holds a NaN or an infinity; use another checkpoint")
            yield np.ascontiguousarray(values).tobytes()

    def _bands(self, arrays: Ours, name: str) -> list[Box]:
        """The array cut along its first dimension where all that it is made of is cut."""
        whole = Box.whole(arrays.shape(name))
        pieces = arrays.pieces[name]
        if any(len(piece.shape) < len(whole.shape) for piece in pieces) or not whole.shape:
            return [whole]
        starts = {
            piece.ours(box).start[0] for piece in pieces for box in self.stored.bands(piece.tensor) if box.shape[0]
        }
        firsts = sorted(starts)
        ends = [*firsts[1:], whole.shape[0]]
        return [whole.rows(first, end - first) for first, end in zip(firsts, ends, strict=True)]

    def write_others(self) -> None:
        """What belongs to the run beside its checkpoint, once that is written."""
        self._check_digests()
        if (self.source / TOKENIZER_FILE).is_file():
            shutil.copyfile(self.source / TOKENIZER_FILE, self.config.run.dir / TOKENIZER_FILE)

    def _check_digests(self) -> None:
        """Compare the tensors with their checksums, if moeport wrote them. Raises DataError, which names the first."""
        if self.record is None:
            return
        known: dict[str, str] = self.record["sha256"]
        for name in self.stored:
            if known.get(name) != self.stored.digest(name):
                raise DataError(
                    f"{self.source}: {name} is not what was written: it is damaged, or was changed; delete {FILE} and "
                    "give --config if it was changed on purpose"
                )

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        notes = []
        if self.meta.data and not self.resumes:
            notes.append(
                "without the optimiser's state: the run cannot be resumed, and one that starts from these weights "
                "starts with a fresh optimiser"
            )
        if self.left_aside and not self.meta.data:
            notes.append(
                f"left aside: {len(self.left_aside)} tensors of the optimiser and the run ({self.left_aside[0]}, ...): "
                "a run that starts from these weights starts with a fresh optimiser"
            )
        if self.no_tensors:
            shown = ", ".join(self.no_tensors[:3]) + (", ..." if self.no_tensors[3:] else "")
            notes.append(f"left aside: {len(self.no_tensors)} entries that are not tensors ({shown})")
        return tuple(notes)


def _zeros(shape: tuple[int, ...]) -> Iterator[bytes]:
    yield bytes(4 * math.prod(shape))
