"""What the ranks of a job must have alike, and what may differ from host to host.

Ranks that were started differently would train on, each in its own way, or wait for each other in collectives that do
not match. So whatever decides what a rank computes is compared: before the framework communicates, and what is known
only later (data, checkpoint, device) as soon as it is known, before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeport.ascend.table import COMPUTES
from moeport.backends.base import Backend
from moeport.comm.agreement import Topic
from moeport.config.schema import Config
from moeport.core.parameters import INITIAL_VALUES_VERSION
from moeport.data import Examples
from moeport.facts import BACKENDS
from moeport.training.checkpoint import Checkpoint
from moeport.training.checkpoint_meta import META_FILE, file_digest
from moeport.training.run_dir import leaves
from moeport.version import VERSION

MAY_DIFFER: Mapping[str, str] = {
    "run.dir": "hosts may mount it under other paths; that all see the same folder is checked before step 1",
    "data.cache_dir": "each host may have its own; what is read from it is compared",
    "data.root": "files may lie elsewhere on another host; their text and their names below it are compared",
    "data.source.paths": "files may lie elsewhere on another host; their text is compared",
    "data.source.validation_paths": "as data.source.paths",
    "data.tokenizer.path": "the tokenizer is compared",
}
"""Keys of the config that may differ between ranks, and why."""

ENVIRONMENT: Mapping[str, str] = {
    **COMPUTES,
    "ATEN_CPU_CAPABILITY": "vector instructions of torch's kernels on the CPU",
    "CUBLAS_WORKSPACE_CONFIG": "determinism of cuBLAS",
    "DNNL_DEFAULT_FPMATH_MODE": "type in which oneDNN multiplies (older name)",
    "DNNL_MAX_CPU_ISA": "instructions of oneDNN (older name)",
    "MKL_CBWR": "instructions of MKL",
    "MKL_ENABLE_INSTRUCTIONS": "instructions of MKL",
    "MS_SIMULATION_LEVEL": "whether MindSpore computes at all",
    "NCCL_ALGO": "algorithm of NCCL",
    "NCCL_PROTO": "protocol of NCCL",
    "NVIDIA_TF32_OVERRIDE": "whether CUDA multiplies float32 as TF32",
    "ONEDNN_DEFAULT_FPMATH_MODE": "type in which oneDNN multiplies",
    "ONEDNN_MAX_CPU_ISA": "instructions of oneDNN",
    "OPENBLAS_CORETYPE": "instructions of OpenBLAS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "whether torch multiplies float32 as TF32",
    "TORCH_BLAS_PREFER_CUBLASLT": "library of torch's products on CUDA",
    "TORCH_LINALG_PREFER_CUSOLVER": "library of torch's decompositions on CUDA",
}
"""Environment variables that change what a rank computes, and what they change."""

SAME_COMMAND = "start every rank with the same command"
SAME_CONFIG = "start every rank with the same config and the same --set"
SAME_VERSION = "install the same versions on every host"
SAME_ENVIRONMENT = "set it alike for every rank, or for none"
SAME_DEVICE = "let every host have the same kind of device, or set backend.device and backend.dtype"
SAME_KERNELS = "run moeport doctor on each host, which says why, or set the kernel to default in backend.kernels"
SAME_CHECKPOINT = "put run.dir on storage that all nodes share"
SAME_FILES = "give every rank the same files, for instance on storage that all nodes share"
SAME_DATA = "give every rank the same data, for instance on storage that all nodes share"


def of_start(
    command: str, config: Config, options: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> list[Topic]:
    """What is known before anything else happens.

    Args:
        command: of moeport, such as `train`.
        config: the whole config.
        options: by name, as on the command line; paths that may differ are left out.
        environment: variables of this process.
    """
    return [*of_command(command, config.backend.name, options, environment), of_config(config)]


def of_config(config: Config) -> Topic:
    """Every key of a config but those that may differ."""
    keys = leaves(config.model_dump(mode="json"))
    return Topic(SAME_CONFIG, {key: value for key, value in keys.items() if key not in MAY_DIFFER})


def of_command(
    command: str, backend: str, options: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> list[Topic]:
    """The same for a command without a config. `backend` is its name."""
    facts = BACKENDS[backend]
    packages = {name: _version(name) for name in (facts.framework, *facts.extensions, "numpy")}
    versions = {"moeport": VERSION, "the initial values": INITIAL_VALUES_VERSION} | packages
    return [
        Topic(SAME_COMMAND, {"the command": f"moeport {command}", **options}),
        Topic(SAME_VERSION, {f"the version of {name}": found for name, found in versions.items()}),
        Topic(SAME_ENVIRONMENT, {f"the environment variable {name}": environment.get(name) for name in ENVIRONMENT}),
    ]


def of_options(options: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a dataclass, with those of dataclasses inside it, by dotted name; paths as text."""
    flat = leaves(asdict(options))
    kept = {key: value for key, value in flat.items() if not key.startswith(left_out)} if left_out else flat
    return {f"the option {key}": _plain(value) for key, value in kept.items()}


def of_backend(backend: Backend) -> Topic:
    """What `backend.device: auto` has chosen on this host, and on NPUs the version of CANN."""
    found = {"the kind of device": backend.device.partition(" ")[0]}
    cann = backend.versions().get("CANN")
    return Topic(SAME_DEVICE, found | ({"the version of CANN": cann} if cann else {}))


def of_dtype(backend: Backend) -> Topic:
    """What `backend.dtype: auto` has chosen, once the ranks communicate: it may be the choice of one for all."""
    return Topic(SAME_DEVICE, {"the compute type": backend.dtype})


def of_kernels(backend: Backend) -> Topic:
    """Which fused operators have passed their trials, once each rank has its device."""
    return Topic(SAME_KERNELS, {f"what computes {kernel}": name for kernel, name in backend.fused_kernels().items()})


def of_checkpoint(checkpoint: Checkpoint | None, is_finished: bool) -> Topic:
    """What a run is resumed from, as this rank has read it."""
    found = None
    if checkpoint:
        listed = of_file(checkpoint.path / META_FILE)  # which has the digests of the other files
        found = f"step {checkpoint.meta.step}, {listed}"
    return Topic(SAME_CHECKPOINT, {"the checkpoint to resume from": found, "whether the run is finished": is_finished})


def of_data(train: Examples, validation: Examples, vocab_size: int, tokenizer: str | None) -> Topic:
    """What a run learns from and is evaluated on.

    Args:
        train: training examples.
        validation: validation examples.
        vocab_size: size of the tokenizer's vocabulary.
        tokenizer: its fingerprint; None for images.
    """
    values: dict[str, Any] = {}
    if tokenizer:
        values["the tokenizer"] = f"{vocab_size} tokens, SHA-256 {tokenizer[:16]}"
    for name, examples in {"training": train, "validation": validation}.items():
        values[f"the {name} data"] = f"{examples.num_sequences} sequences, SHA-256 {examples.fingerprint[:16]}"
    return Topic(SAME_DATA, values)


def of_file(file: Path | None) -> str | None:
    """What a file holds, as a value to compare."""
    if file is None or not file.is_file():
        return None
    return f"SHA-256 {file_digest(file)['sha256'][:16]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
