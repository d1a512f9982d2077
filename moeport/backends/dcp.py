"""Folders of torch.distributed.checkpoint (DCP), which need PyTorch but no process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.backends import found
from moeport.core.weights import Weights

METADATA = ".metadata"
"""The file that says what a folder holds."""


def read_dcp(folder: Path) -> tuple[Weights, list[str]]:
    """The tensors in a folder, to be read a part at a time, and the names of the entries that are not tensors.

    Raises DataError if a tensor is not there completely and once, or a file is cut off; BackendUnavailableError if
    PyTorch is missing.
    """
    stored = _of_torch("DcpWeights")(folder)
    return stored, stored.others


def write_dcp(folder: Path, arrays: Weights) -> dict[str, str]:
    """Write arrays to an empty folder, each part of each array once and in order; returns their SHA-256.

    Raises OSError if the folder cannot be written; BackendUnavailableError if PyTorch is missing.
    """
    digests: dict[str, str] = _of_torch("write_dcp")(folder, arrays)
    return digests


def _of_torch(attribute: str) -> Any:
    return found("torch", "moeport.backends.torch.dcp", attribute, "torch.distributed.checkpoint")
