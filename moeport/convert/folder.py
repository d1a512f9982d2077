"""A folder of the Hugging Face hub: its config.json, its tensors, and the files that are carried along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.errors import DataError, UserError
from moeport.reading import MAX_BYTES, read_json
from moeport.training.tensor_file import StoredTensor, read_header

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CHECKSUMS = "moeport-checksums.json"
_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ""}
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf")
MOST_FAULTS = 8
"""Tensors that one message names."""


@dataclass(frozen=True)
class Folder:
    """A checkpoint as it lies in a folder."""

    path: Path
    config: dict[str, Any]
    """The keys of config.json."""
    tensors: Mapping[str, StoredTensor]
    left_aside: tuple[str, ...]
    """Files with tensors that the index does not name."""

    @property
    def config_file(self) -> Path:
        """Its config.json."""
        return self.path / CONFIG


def read_folder(path: Path) -> Folder:
    """The contents of a folder, without the values of its tensors.

    Raises UserError if something is missing, or DataError if a file is damaged or the files contradict each other.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: is not a folder; expected one with {CONFIG} and {WEIGHTS}, as hf download NAME --local-dir "
            "FOLDER fetches it"
        )
    config = read_object(path / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path / CONFIG}: has no model_type; expected the config.json of a language model")
    single, index = path / WEIGHTS, path / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{path}: has both {WEIGHTS} and {INDEX}; remove the wrong one")
    if index.exists():
        tensors = _sharded(path, index)
    elif single.exists():
        tensors = read_header(single)
    else:
        raise UserError(f"{path}: has no {WEIGHTS} and no {INDEX}{_advice(path)}")
    read = {tensor.file.name for tensor in tensors.values()}
    aside = sorted(file.name for file in path.glob("*.safetensors") if file.name not in read)
    return Folder(path, config, tensors, tuple(aside))


def copy_carried(source: Path, target: Path) -> list[str]:
    """Copy the files beside the weights, such as those of the tokenizer and of generation; returns their names."""
    names = []
    for file in sorted(source.iterdir()):
        is_carried = file.suffix in _CARRIED_SUFFIXES and file.name not in (CONFIG, INDEX, CHECKSUMS)
        if is_carried and file.is_file() and file.name[0] != "." and file.stat().st_size <= MAX_BYTES:
            shutil.copyfile(file, target / file.name)
            names.append(file.name)
    return names


def check_tensors(folder: Folder, expected: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or type.

    Args:
        folder: the folder.
        expected: shape of each tensor.
        dtypes: the types that can be converted.

    Raises DataError, which names them.
    """
    found = folder.tensors
    faults = [f"{name}: missing" for name in expected if name not in found]
    faults += [f"{name}: unknown" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        tensor = found[name]
        if tensor.shape != expected[name]:
            faults.append(f"{name}: shape {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype not in dtypes:
            faults.append(f"{name}: type {tensor.dtype}, expected {', '.join(dtypes)}")
    if faults:
        faults = sorted(faults)
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise DataError(
            f"{folder.path}: the tensors are not those of the model that {CONFIG} describes: "
            f"{'; '.join(faults[:MOST_FAULTS])}{more}"
        )


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it cannot be read or holds something else."""
    try:
        value = read_json(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: is {json.dumps(value)[:40]}; expected an object")
    return value


def _sharded(path: Path, index: Path) -> dict[str, StoredTensor]:
    """The tensors of several files, each in the one that the index says."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DataError(f"{index}: has no weight_map from tensors to files")
    found: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        if Path(name).name != name or not (path / name).is_file():
            raise DataError(f"{index}: names the file {name}, which is not in {path}; fetch it")
        for tensor in read_header(path / name).values():
            if tensor.name in found:
                files = f"{found[tensor.name].file.name} and {name}"
                raise DataError(f"{path}: {tensor.name} occurs twice, in {files}; remove one")
            if tensor.name not in weight_map:
                raise DataError(f"{index}: does not name {tensor.name}, which is in {name}")
            found[tensor.name] = tensor
    for tensor_name, name in weight_map.items():
        if tensor_name not in found:
            raise DataError(f"{path / name}: has no {tensor_name}, which {index.name} says it has; fetch it again")
        if found[tensor_name].file.name != name:
            raise DataError(f"{index}: says that {tensor_name} is in {name}, but {found[tensor_name].file.name} has it")
    return found


def _advice(path: Path) -> str:
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))
    if not others:
        return "; expected a folder as save_pretrained writes it"
    return f", only {others[0]}; load it with transformers and save it with save_pretrained, which writes safetensors"
