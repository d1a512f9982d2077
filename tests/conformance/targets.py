"""The backends, devices and compute types that the suite runs against, from the table of backends."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.conformance.check import GRADIENT_TOLERANCE as GRADIENT_TOLERANCE
from moeport.conformance.check import TOLERANCE as TOLERANCE
from moeport.conformance.forms import with_default_kernels as with_default_kernels
from moeport.facts import BACKENDS


@dataclass(frozen=True)
class Target:
    backend: str
    device: str
    dtype: str
    default_kernels: bool = False
    """Run the default compositions of the kernels in place of the backend's own."""
    static: bool = False
    """Run MindSpore's operations of fixed shapes, and compile whole models. Otherwise nothing is compiled."""

    def __str__(self):
        variant = "-default" if self.default_kernels else "-static" if self.static else ""
        return f"{self.backend}-{self.device}-{self.dtype}{variant}"

    def build(self):
        pytest.importorskip(BACKENDS[self.backend].framework)
        return build(self)


@functools.cache
def build(target):
    compiles = None if target.static else False
    backend: Any = get_backend(
        BackendConfig(name=target.backend, device=target.device, dtype=target.dtype, compile=compiles)
    )
    if target.default_kernels:
        backend.ops = with_default_kernels(backend.ops)
    if target.static:
        backend.ops = backend.forms()["compiled"]
    return backend


TARGETS = [
    *(Target(name, "cpu", dtype) for name, facts in BACKENDS.items() for dtype in facts.dtypes.get("cpu", ())),
    *(Target("torch", "cpu", dtype, default_kernels=True) for dtype in ("float64", "bfloat16")),
    *(Target("mindspore", "cpu", dtype, static=True) for dtype in ("float32", "float64")),
    *(Target(name, "cuda", dtype) for name, facts in BACKENDS.items() for dtype in facts.dtypes.get("cuda", ())),
    *(Target("torch", "npu", dtype) for dtype in BACKENDS["torch"].dtypes["npu"]),
    Target("torch", "npu", "float64", default_kernels=True),
]
MARKS = {"cuda": [pytest.mark.cuda], "npu": [pytest.mark.npu]}
"""By device: what a target needs."""


def parameters(targets):
    return [pytest.param(target, id=str(target), marks=MARKS.get(target.device, [])) for target in targets]


COMPOSED = [
    target
    for target in TARGETS
    if not target.default_kernels
    and (target.backend != "mindspore" or target.static == (target.dtype == "float32"))
    and target.device != "npu"  # tests/npu has its layers and models
]
"""For routers, layers and models, which are the same code on every form of the operations. The suite of the operations
runs on all; parity of MindSpore's float32 operations, one after the other, with torch is in tests/parity.
"""


def training(targets):
    return [target for target in targets if target.backend != "numpy"]


every_form = pytest.mark.parametrize("target", parameters(TARGETS))
every_form_that_trains = pytest.mark.parametrize("target", parameters(training(TARGETS)))
"""For the operations themselves."""
every_target = pytest.mark.parametrize("target", parameters(COMPOSED))
every_training_target = pytest.mark.parametrize("target", parameters(training(COMPOSED)))
every_accurate_training_target = pytest.mark.parametrize(
    "target", parameters([target for target in training(COMPOSED) if target.dtype != "bfloat16"])
)
"""For what is computed in float32 at least whatever the compute type."""
