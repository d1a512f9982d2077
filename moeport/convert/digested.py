"""Arrays whose SHA-256 is taken while they are read, so that a comparison needs no second reading."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from typing_extensions import override

from moeport.core.weights import Box, Weights, Wrapped


class Digested(Wrapped):
    """Arrays that are hashed as far as they are read row after row, from the first."""

    def __init__(self, arrays: Weights):
        super().__init__(arrays)
        self._digests: dict[str, Any] = {}
        self._hashed: dict[str, int] = {}
        """The number of elements in each digest."""

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        values = super().read(name, box)
        done = self._hashed.get(name, 0)
        whole = self.shape(name)
        first = box.start[0] * math.prod(whole[1:]) if whole else 0
        if box.shape[1:] == whole[1:] and first == done:
            self._digests.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(values).tobytes())
            self._hashed[name] = done + values.size
        return values

    def digest(self, name: str) -> str:
        """SHA-256 of an array in row-major order; it is read here unless it has been read in order."""
        if self._hashed.get(name) != math.prod(self.shape(name)):
            self._hashed.pop(name, None)
            self._digests.pop(name, None)
            for box in self.bands(name):
                self.read(name, box)
        return str(self._digests[name].hexdigest())
