"""How a folder for transformers is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeport.convert.parts import Layout
from moeport.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written."""

    family: str | None = None
    """A model_type; None: that of the folder that the run was converted from, or the first that can express it."""
    layout: Layout | None = None
    """None: as in the folder that the run was converted from, or a tensor per expert."""
    dtype: str | None = None
    """Element type; None: as in that folder, or as in the checkpoint."""
    shard_size: int = 5 * 10**9
    """Maximum number of bytes per file, unless one tensor is larger."""
    checkpoint: str = "latest"
    """latest, best or step-N."""


def parse_size(text: str) -> int:
    """A number of bytes such as 500MB or 5GB. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    size = float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"{text}: is not a size; expected a number with KB, MB, GB or TB, as in 5GB")
    return int(size)
