"""Tries out one framework or package and writes what it found as JSON.

`moeport.backends.doctor` runs this in a separate process, `python -m moeport.backends.examine MODULE FILE
[BACKEND]`, because a broken installation can end the process that imports it.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moeport.ascend.trouble import messages
from moeport.backends import get_backend
from moeport.backends.base import Backend, TrainingOptions
from moeport.config.model import AttentionConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.ops import FLOAT_DTYPES
from moeport.core.parameters import initial_parameters
from moeport.errors import MoeportError
from moeport.facts import BACKENDS
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM

VOCAB_SIZE = 32
TINY = ModelConfig(
    num_layers=1,
    d_model=16,
    attention=AttentionConfig(num_heads=2),
    moe=MoEConfig(num_experts=2, expert_hidden=16),
)


def examine(module: str, backend: str | None = None) -> dict[str, Any]:
    """Import a package; if a backend uses it, compute on each of the backend's devices.

    Returns: `version` and `problem`, which is None if there is none; for a backend also `trains`, `divides`,
    `threads`, `communication`, `private_names` and `devices`. A package that fails to import has in `said` also the
    errors that led to it.
    """
    try:
        package = importlib.import_module(module)
    except Exception as error:
        problem = f"installed but fails to import: {_describe(error)}"
        return {"version": None, "problem": problem, "said": messages(error)}
    found: dict[str, Any] = {"version": _version(module.partition(".")[0], package), "problem": None}
    if backend:
        try:
            found["trains"] = get_backend(BackendConfig(name=backend, device="cpu")).trains
            found |= {"divides": list(BACKENDS[backend].shards), "devices": {}}
            found["devices"]["cpu"] = _device(backend, "cpu")
            chosen = get_backend(BackendConfig(name=backend))
            found |= {"threads": chosen.threads(), "communication": chosen.communication()}
            found["private_names"] = list(chosen.private_names)
            kind = chosen.device.partition(" ")[0]
            if kind != "cpu":
                units = [{"name": name, "memory_bytes": memory} for name, memory in chosen.accelerators()]
                found["devices"][kind] = _device(backend, "auto") | {"description": chosen.device, "units": units}
        except Exception as error:
            found["problem"] = _describe(error)
    return found


def _device(name: str, device: str) -> dict[str, Any]:
    """Compute on one device in every compute type."""
    found: dict[str, Any] = {"description": device, "units": [], "dtypes": {}, "timed": None}
    for dtype in FLOAT_DTYPES:
        try:
            backend = get_backend(BackendConfig(name=name, device=device, dtype=dtype))
            run_tiny_model(backend)
            speed = backend.matmul_flops_per_second()
        except Exception as error:
            found["dtypes"][dtype] = {"usable": False, "problem": _describe(error)}
            continue
        found["description"] = backend.device
        found["dtypes"][dtype] = {
            "usable": True,
            "problem": None,
            "matmul_flops_per_second": round(speed),
            "kernels": backend.kernel_choices(),
        }
        found["timed"] = backend.timed_kernels()
    speeds = {dtype: result.get("matmul_flops_per_second") for dtype, result in found["dtypes"].items()}
    both = speeds["bfloat16"] and speeds["float32"]
    found["bfloat16_over_float32"] = round(speeds["bfloat16"] / speeds["float32"], 2) if both else None
    return found


def run_tiny_model(backend: Backend) -> None:
    """One step of training, or one evaluation, of a tiny model; ArithmeticError if a result is not finite."""
    lm = DecoderLM(TINY, VOCAB_SIZE)
    params = initial_parameters(lm.parameter_specs(), seed=0)
    token_BS = np.arange(16).reshape(2, 8)
    batch = Batch(token_BS, token_BS + 1)
    if backend.trains:
        model = backend.training_model(lm, params, TrainingOptions(OptimizerConfig()))
        loss = model.accumulate(batch, 1.0).loss
        norm = model.gradient_norm()
        model.step(1e-3, norm)
        results = {"loss": loss, "gradient norm": norm}
    else:
        results = {"loss": backend.evaluation_model(lm, params).evaluate(batch).loss}
    for label, value in results.items():
        number = float(backend.ops.to_numpy(value))
        if not math.isfinite(number):
            raise ArithmeticError(f"the {label} of a tiny model is {number}")


def _version(package: str, module: Any) -> str | None:
    version = getattr(module, "__version__", None)
    if version is None:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    return str(version)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, MoeportError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(examine(sys.argv[1], *sys.argv[3:])))
