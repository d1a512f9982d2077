"""The MindSpore backend: its CPU target, and Ascend."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Tensor

from moeport.ascend.installed import versions
from moeport.backends.base import Backend, TrainingModel, TrainingOptions
from moeport.backends.mindspore.communicator import start
from moeport.backends.mindspore.device import accelerators, describe_device, resolve_device, resolve_dtype, use_device
from moeport.backends.mindspore.graphs import Graphs
from moeport.backends.mindspore.kernels import try_fused, with_fused
from moeport.backends.mindspore.model import MindSporeEvaluationModel
from moeport.backends.mindspore.ops import MindSporeOps
from moeport.backends.mindspore.private import NAMES
from moeport.backends.mindspore.profiler import MindSporeProfiler
from moeport.backends.mindspore.training_model import MindSporeTrainingModel
from moeport.backends.profiler import Profiler
from moeport.backends.trial import Choice, refuse_named
from moeport.comm.communicator import TIMEOUT_SECONDS, Communicator
from moeport.comm.job import Job
from moeport.comm.mesh import Mesh
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.core.ops import KERNELS, Ops
from moeport.launch.launcher import Launch
from moeport.model.transformer import Transformer

FORM_ROWS = 10_000
"""Rows per expert: more than any check has."""
OWN_KERNELS = {
    "gelu": "mindspore.ops.gelu",
    "inverse": "sum by place",
    "sort_by_group": "one sort of distinct keys, and a sum by place",
}
"""Descriptions of the kernels of MindSporeOps."""
COMPILED_KERNELS = {
    "linear": "MatMul with a transposed weight",
    "rms_norm": "products with ones instead of sums",
    "rope": "halves swapped by a product with a signed permutation",
    "attention": "batched products, with an additive mask",
    "swiglu": "mindspore.ops.silu, then multiply",
    "grouped_mlp": "one batched product over experts padded to equal numbers of rows",
    "linear_cross_entropy": "gradients in the forward pass",
    "linear_cross_entropy_by_token": "as linear_cross_entropy",
}
"""Descriptions of the kernels of StaticOps."""


class MindSporeBackend(Backend):
    """MindSpore on one device, compiled unless the config says otherwise."""

    name = "mindspore"
    private_names = NAMES

    def __init__(self, config: BackendConfig):
        self.device_name = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device_name)
        use_device(self.device_name, config.deterministic)
        self.device = describe_device(self.device_name)
        self.kernels = config.kernels
        self.fused: dict[str, Choice] = {}
        if self.device_name == "npu":
            self.fused = try_fused(MindSporeOps(), self.dtype, config.kernels)
        else:
            refuse_named(config.kernels, self.device_name)
        self.ops: MindSporeOps = with_fused(MindSporeOps(), self.fused)
        self.graphs = Graphs(self.fused)
        self.compiles = config.compile is not False

    @override
    def forms(self) -> dict[str, Ops]:
        return {**super().forms(), "compiled": self.graphs.ops(expert_rows=FORM_ROWS, differentiable=True)}

    @override
    def value_and_grad(self, fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        def run(params: Mapping[str, Tensor], *args: Any) -> tuple[Any, dict[str, Tensor]]:
            names = [name for name, value in params.items() if value.dtype in (ms.float32, ms.float64)]
            rest = {name: value for name, value in params.items() if name not in names}

            def positional(*values: Tensor) -> Any:
                return fn({**rest, **dict(zip(names, values, strict=True))}, *args)

            grad = ms.value_and_grad(positional, tuple(range(len(names))), None, has_aux=has_aux)
            out, grads = grad(*(params[name] for name in names))
            grads = grads if isinstance(grads, tuple) else (grads,)
            return out, dict(zip(names, grads, strict=True))

        return run

    @override
    def evaluation_model(self, model: Transformer, params: Mapping[str, np.ndarray]) -> MindSporeEvaluationModel:
        return MindSporeEvaluationModel(self.ops, self.dtype, self._graphs(), model, params)

    @override
    def training_model(
        self, model: Transformer, params: Mapping[str, np.ndarray], options: TrainingOptions, mesh: Mesh | None = None
    ) -> MindSporeTrainingModel:
        graphs = None if options.compile is False else self._graphs()
        return MindSporeTrainingModel(self.ops, self.dtype, graphs, model, params, options, mesh)

    def _graphs(self) -> Graphs | None:
        return self.graphs if self.compiles else None

    @override
    def communicator(
        self, launch: Launch | None, timeout_s: float = TIMEOUT_SECONDS, job: Job | None = None
    ) -> Communicator:
        return start(self.ops, launch, timeout_s, job) if launch else SingleProcess(self.ops)

    @override
    def matmul_flops_per_second(self) -> float:
        x = self.ops.zeros((1024, 1024), self.dtype)
        self.ops.matmul(x, x).asnumpy()
        start = time.perf_counter()
        self.ops.matmul(x, x).asnumpy()
        return 2 * 1024**3 / (time.perf_counter() - start)

    @override
    def profiler(self, model: TrainingModel) -> Profiler:
        return MindSporeProfiler(self.device_name)

    @override
    def compilations(self) -> tuple[int, float]:
        return self.graphs.compilations.count, self.graphs.compilations.seconds

    @override
    def communication(self) -> dict[str, str | None]:
        return {"mccl": "built in", "hccl": "built in" if self.device_name == "npu" else None}

    @override
    def accelerators(self) -> list[tuple[str, int | None]]:
        return accelerators()

    @override
    def versions(self) -> dict[str, str]:
        found = {"mindspore": ms.__version__, "numpy": np.__version__}
        return found | (versions() if self.device_name == "npu" else {})

    @override
    def kernel_choices(self) -> dict[str, str]:
        tried = self.fused or try_fused(self.ops, self.dtype, self.kernels)
        chosen = dict.fromkeys(KERNELS, "default composition") | OWN_KERNELS
        if self.compiles:
            chosen |= COMPILED_KERNELS
        for kernel, choice in tried.items():
            chosen[kernel] = choice.label if choice.function else f"{chosen[kernel]}; {choice.label}"
        return chosen

    @override
    def fused_kernels(self) -> dict[str, str]:
        return {kernel: choice.operator for kernel, choice in self.fused.items()}
