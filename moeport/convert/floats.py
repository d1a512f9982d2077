"""Element types of checkpoints: bytes to numbers and back, also of bfloat16, which numpy lacks."""

from __future__ import annotations

import numpy as np

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Name of a type for users, by its name in safetensors."""
CODES = {name: code for code, name in DTYPES.items()}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def decoded(block: bytes, code: str) -> np.ndarray:
    """The numbers that bytes of a type stand for: float64 for F64, otherwise float32, which holds each of them exactly.

    Args:
        block: whole elements.
        code: a key of DTYPES.
    """
    if code == "BF16":
        return (np.frombuffer(block, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    values = np.frombuffer(block, _NUMPY[code])
    return values.astype("<f4") if code == "F16" else values


def encoded(values: np.ndarray, code: str) -> bytes:
    """The bytes of finite numbers in a type, rounded to nearest, ties to even; too large ones become infinite."""
    if code != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(_NUMPY[code]).tobytes()
    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype("<u2").tobytes()
