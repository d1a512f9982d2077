"""The backends, devices and compute types that the suite runs against; a new backend is one line in TARGETS."""

import functools
from dataclasses import dataclass

import pytest

from moeport.backends import get_backend
from moeport.config.training import BackendConfig

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2**-7}
"""Forward, relative to the largest element."""
GRADIENT_TOLERANCE = {"float64": 1e-9, "float32": 5e-6, "bfloat16": 2**-6}
"""Backward against finite differences, which are good to some 1e-10."""


@dataclass(frozen=True)
class Target:
    backend: str
    device: str
    dtype: str

    def __str__(self):
        return f"{self.backend}-{self.device}-{self.dtype}"

    def build(self):
        pytest.importorskip(self.backend)
        return build(self)


@functools.cache
def build(target):
    return get_backend(BackendConfig(name=target.backend, device=target.device, dtype=target.dtype))


TARGETS = [
    *(Target("numpy", "cpu", dtype) for dtype in ("float32", "float64")),
    *(Target("torch", "cpu", dtype) for dtype in ("float32", "float64", "bfloat16")),
    *(Target("torch", "cuda", dtype) for dtype in ("float32", "float64", "bfloat16")),
]
"""numpy stands here for the framework's import name too."""


def parameters(targets):
    return [
        pytest.param(target, id=str(target), marks=[pytest.mark.cuda] if target.device == "cuda" else [])
        for target in targets
    ]


training = [target for target in TARGETS if target.backend != "numpy"]
every_target = pytest.mark.parametrize("target", parameters(TARGETS))
every_training_target = pytest.mark.parametrize("target", parameters(training))
every_accurate_training_target = pytest.mark.parametrize(
    "target", parameters([target for target in training if target.dtype != "bfloat16"])
)
"""For what is computed in float32 at least whatever the compute type."""
