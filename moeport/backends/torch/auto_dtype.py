"""What `backend.dtype: auto` chooses: bfloat16 where products are measurably faster in it.

The choice takes a fraction of a second, and is kept in the cache folder for machines and installations of the same
kind.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moeport.backends.torch.device import describe_device, matmul_flops_per_second
from moeport.data.cache import cache_dir
from moeport.errors import WriteError
from moeport.files import write_json
from moeport.launch.machine import processor

MIN_SPEEDUP = 1.3
"""bfloat16 is chosen if products are at least this many times as fast as in float32."""
TRIAL_SECONDS = 0.12
"""Of each type."""
CHOICES = ("bfloat16", "float32")


def choose_dtype(device: torch.device) -> str:
    """bfloat16 or float32, whichever suits the device."""
    if device.type == "cpu" and processor().bfloat16 is False:
        return "float32"  # products in bfloat16 are emulated: one can take seconds
    key = _key(device)
    file = _file(key)
    found = _read(file, key)
    if found is None:
        speed = {dtype: matmul_flops_per_second(device, getattr(torch, dtype), TRIAL_SECONDS) for dtype in CHOICES}
        speedup = speed["bfloat16"] / speed["float32"]
        found = "bfloat16" if speedup >= MIN_SPEEDUP else "float32"
        with suppress(WriteError):  # the next run measures again
            write_json(file, {"key": key, "dtype": found, "speedup": round(speedup, 3)})
    return found


def _key(device: torch.device) -> dict[str, Any]:
    """What the choice depends on."""
    return {
        "device": processor().model if device.type == "cpu" else describe_device(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "at_least": MIN_SPEEDUP,
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
