"""A checkpoint of moeport in the form of torch.distributed.checkpoint (DCP), which torchtitan and others train with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from moeport.backends.dcp import write_dcp
from moeport.convert.dcp_names import EMBEDDING, Names, Theirs, pieces_of, specs_of
from moeport.convert.dcp_record import write_record
from moeport.convert.progress import Report, silent
from moeport.core.weights import Box, Weights, Wrapped, shape_of
from moeport.errors import DataError, UserError
from moeport.files import atomic_folder
from moeport.training.checkpoint import find_checkpoint, open_checkpoint
from moeport.training.checkpoint_meta import META_FILE
from moeport.training.run_dir import CHECKPOINT_DIR, TOKENIZER_FILE, config_of, read_config


@dataclass(frozen=True)
class ToDcp:
    """What was written."""

    checkpoint: Path
    tensors: int
    parameters: int
    """Number of elements of the parameters."""
    moments: bool
    """Whether the optimiser's state was written too."""


def to_dcp(
    source: Path, target: Path, names: Names = "moeport", checkpoint: str = "latest", report: Report = silent
) -> ToDcp:
    """Write a checkpoint as torch.distributed.checkpoint does, in a folder that appears once it is complete.

    Args:
        source: a run folder, or a checkpoint.
        target: the folder to make.
        names: whose names the tensors get.
        checkpoint: latest, best or step-N, if `source` is a run folder.
        report: is told of each part that was written.

    Raises:
        BackendUnavailableError: PyTorch is missing.
        UserError: the model cannot be given these names.
        CheckpointError: the checkpoint is damaged.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another folder, or remove it")
    path = source
    if not (source / META_FILE).is_file():
        if not (source / CHECKPOINT_DIR).is_dir():
            read_config(source)
        path = find_checkpoint(source / CHECKPOINT_DIR, checkpoint)
    opened = open_checkpoint(path)
    config = config_of(opened)
    specs = specs_of(config, shape_of(opened.model, EMBEDDING)[0], str(source))
    pieces = pieces_of(names, config.model, specs)
    arrays = Theirs(pieces, names, opened.model, opened.optimizer, config.training.updates(opened.meta.step))
    with atomic_folder(target) as folder:
        digests = write_dcp(folder, _Reported(arrays, report, "a NaN or an infinity: the run had diverged"))
        write_record(folder, names, digests, opened.meta)
        if (tokenizer := path.resolve().parent.parent / TOKENIZER_FILE).is_file():
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    return ToDcp(path, len(arrays), sum(spec.size for spec in specs), arrays.has_moments)


class _Reported(Wrapped):
    """Arrays of which every part that is read is checked and reported."""

    def __init__(self, arrays: Weights, report: Report, fault: str):
        super().__init__(arrays)
        self.report, self.fault = report, fault
        self.done = 0
        self.total = sum(np.dtype(arrays.dtype(name)).itemsize * Box.whole(arrays.shape(name)).size for name in arrays)

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        values = super().read(name, box)
        if not np.isfinite(values).all():
            raise DataError(f"{name} holds {self.fault}; use an earlier checkpoint")
        self.done += values.nbytes
        self.report(name, self.done, self.total)
        return values
