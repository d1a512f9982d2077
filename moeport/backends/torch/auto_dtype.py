"""What `backend.dtype: auto` chooses: bfloat16 where it is measurably faster, in products and, on a CPU, in the steps
of a small model.

The choice takes a second or so, and is kept in the cache folder for machines and installations of the same kind, and
for models of the same sizes.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moeport.backends.torch import step_trial
from moeport.backends.torch.device import describe_device, matmul_flops_per_second
from moeport.backends.torch.fused import FusedOps, own_operations
from moeport.backends.torch.undisturbed import undisturbed
from moeport.data.cache import cache_dir
from moeport.errors import WriteError
from moeport.files import write_json
from moeport.launch.machine import processor
from moeport.model.planned import Planned

MIN_SPEEDUP = 1.3
"""bfloat16 is chosen if products are at least this many times as fast as in float32,"""
MIN_STEP_SPEEDUP = 1.15
"""and steps, where they are timed, this many times."""
TRIAL_SECONDS = 0.12
"""Of each type."""
CHOICES = ("bfloat16", "float32")


def choose_dtype(device: torch.device, planned: Planned | None = None) -> str:
    """bfloat16 or float32, whichever suits the device.

    Args:
        device: where to compute.
        planned: what will be trained, if that is known. On a CPU, steps of it are timed if it is small.
    """
    if device.type == "cpu" and processor().bfloat16 is False:
        return "float32"  # products in bfloat16 are emulated: one can take seconds
    planned = planned if device.type == "cpu" else None
    key = _key(device, planned)
    file = _file(key)
    found = _read(file, key)
    if found is None:
        products, steps = _speedups(device, planned)
        found = "bfloat16" if products >= MIN_SPEEDUP and (steps or MIN_STEP_SPEEDUP) >= MIN_STEP_SPEEDUP else "float32"
        with suppress(WriteError):  # the next run measures again
            write_json(file, {"key": key, "dtype": found, "speedup": round(products, 3), "step_speedup": steps})
    return found


def _speedups(device: torch.device, planned: Planned | None) -> tuple[float, float | None]:
    """How many times as fast bfloat16 is, in products, and in steps if they are timed."""
    speed = {dtype: matmul_flops_per_second(device, getattr(torch, dtype), TRIAL_SECONDS) for dtype in CHOICES}
    products = speed["bfloat16"] / speed["float32"]
    if products < MIN_SPEEDUP or planned is None or not step_trial.is_small(planned, speed["float32"]):
        return products, None
    ops = own_operations(device)
    if isinstance(ops, FusedOps):
        ops.times = False
    return products, round(undisturbed(device, lambda: step_trial.speedup(planned, ops)), 3)


def _key(device: torch.device, planned: Planned | None) -> dict[str, Any]:
    """What the choice depends on."""
    return {
        "device": processor().model if device.type == "cpu" else describe_device(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "at_least": [MIN_SPEEDUP, MIN_STEP_SPEEDUP],
        "planned": planned and planned.key,
    }


def _file(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_dir(None) / "compute_types" / f"{digest}.json"


def _read(file: Path, key: dict[str, Any]) -> str | None:
    """The choice in a file; None if there is none for this key."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("key") != key or found.get("dtype") not in CHOICES:
        return None
    return str(found["dtype"])
