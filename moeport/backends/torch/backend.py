"""The PyTorch backend: CPU, CUDA and any other device that `torch.accelerator` offers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeport.ascend.installed import versions
from moeport.ascend.table import DETERMINISM
from moeport.backends.base import Backend, TrainingModel, TrainingOptions
from moeport.backends.profiler import Profiler
from moeport.backends.timing import all_kept
from moeport.backends.torch.auto_dtype import choose_dtype
from moeport.backends.torch.communicator import communication_libraries, start
from moeport.backends.torch.described import kernel_choices
from moeport.backends.torch.device import (
    accelerators,
    describe_device,
    matmul_flops_per_second,
    resolve_device,
)
from moeport.backends.torch.foresight import arguments_of
from moeport.backends.torch.fused import FusedOps, own_operations
from moeport.backends.torch.model import TorchEvaluationModel, TorchTrainingModel
from moeport.backends.torch.openmp import describe_threads, threads_given, watch
from moeport.backends.torch.ops import DTYPES, TorchOps
from moeport.backends.torch.private import NAMES
from moeport.backends.torch.profiling.session import TorchProfiler
from moeport.backends.torch.timed import machine_of
from moeport.comm.communicator import TIMEOUT_SECONDS, Communicator
from moeport.comm.job import Job
from moeport.comm.mesh import Mesh
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.core.ops import FLOAT_DTYPES
from moeport.launch.launcher import Launch
from moeport.launch.machine import cores_per_rank
from moeport.model.transformer import Transformer

ModelT = TypeVar("ModelT", bound=TorchEvaluationModel)


class TorchBackend(Backend):
    """PyTorch on one device."""

    name = "torch"
    private_names = NAMES

    def __init__(self, config: BackendConfig):
        self.torch_device = resolve_device(config.device)
        if config.deterministic:
            _set_switches(self.torch_device.type)
        self.device = describe_device(self.torch_device)
        self.chooses_dtype = config.dtype == "auto"
        if not self.chooses_dtype:
            self.dtype = config.dtype
        torch.use_deterministic_algorithms(config.deterministic)
        self.ops: TorchOps = own_operations(self.torch_device, config.kernels)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
        self.said: list[str] = []
        """What models have said since `news` was read."""
        self.watch = watch() if self.torch_device.type == "cpu" else None

    @cached_property
    def dtype(self) -> str:  # type: ignore[override]
        """The compute type; that of `auto` is chosen when it is first asked for, or by rank 0 for all ranks."""
        return choose_dtype(self.torch_device, self.planned)

    @override
    def value_and_grad(self, fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        def run(params: Mapping[str, Tensor], *args: Any) -> tuple[Any, dict[str, Tensor]]:
            leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in params.items()}
            out = fn(leaves, *args)
            loss = out[0] if has_aux else out
            wanted = [value for value in leaves.values() if value.requires_grad]
            grads = iter(
                torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
                if loss.requires_grad
                else map(torch.zeros_like, wanted)
            )
            return out, {name: next(grads) for name, value in leaves.items() if value.requires_grad}

        return run

    @override
    def evaluation_model(self, model: Transformer, params: Mapping[str, np.ndarray]) -> TorchEvaluationModel:
        return self._foreseen(TorchEvaluationModel(self._prepared(), self.dtype, model, params))

    @override
    def training_model(
        self, model: Transformer, params: Mapping[str, np.ndarray], options: TrainingOptions, mesh: Mesh | None = None
    ) -> TorchTrainingModel:
        ops, say = self._prepared(), self.said.append
        return self._foreseen(TorchTrainingModel(ops, self.dtype, model, params, options, mesh, say))

    @override
    def communicator(
        self, launch: Launch | None, timeout_s: float = TIMEOUT_SECONDS, job: Job | None = None
    ) -> Communicator:
        if launch is None:
            return SingleProcess(self.ops)
        self._share_cores(launch)
        world = start(self.ops, launch, timeout_s, job)
        if self.chooses_dtype and world.size > 1:
            own = FLOAT_DTYPES.index(self.dtype) if world.rank == 0 else 0
            chosen = self.ops.to_numpy(world.broadcast(self.ops.from_numpy(np.array([own])), 0))
            self.dtype = FLOAT_DTYPES[int(chosen[0])]
        return world

    def _share_cores(self, launch: Launch) -> None:
        """Give each rank of a node its part of the cores, unless the user has said how many threads there are."""
        if self.torch_device.type == "cpu" and not threads_given():
            torch.set_num_threads(min(torch.get_num_threads(), cores_per_rank(launch)))
            self.device = describe_device(self.torch_device)

    @override
    def matmul_flops_per_second(self) -> float:
        return matmul_flops_per_second(self.torch_device, DTYPES[self.dtype])

    @override
    def profiler(self, model: TrainingModel) -> Profiler:
        if not isinstance(model, TorchTrainingModel):
            raise TypeError(f"profiler: the model is a {type(model).__name__}; expected one of this backend")
        return TorchProfiler(model)

    @override
    def threads(self) -> str | None:
        return describe_threads() if self.torch_device.type == "cpu" else None

    @override
    def news(self) -> list[str]:
        said, self.said[:] = list(self.said), []
        return said + (self.watch.news() if self.watch else [])

    @override
    def communication(self) -> dict[str, str | None]:
        return communication_libraries()

    @override
    def accelerators(self) -> list[tuple[str, int | None]]:
        return accelerators()

    @override
    def versions(self) -> dict[str, str]:
        found = {"torch": torch.__version__, "numpy": np.__version__}
        return found | (versions("torch-npu") if self.torch_device.type == "npu" else {})

    @override
    def kernel_choices(self) -> dict[str, str]:
        return kernel_choices(self._prepared(), self.dtype)

    @override
    def fused_kernels(self) -> dict[str, str]:
        if not isinstance(self.ops, FusedOps):
            return {}
        return {kernel: choice.operator for kernel, choice in self.ops.prepare(self.dtype).items()}

    @override
    def timed_kernels(self) -> dict[str, str] | None:
        if not isinstance(self.ops, FusedOps) or not self.ops.chooses_by_time:
            return None
        return {str(case): str(timed) for case, timed in all_kept(machine_of(self.torch_device))}

    def _prepared(self) -> TorchOps:
        """The operations, once fused kernels have been tried in the compute type.

        Not before there is something to compute: only then do the ranks of a node each have a device.
        """
        if isinstance(self.ops, FusedOps):
            self.ops.prepare(self.dtype)
        return self.ops

    def _foreseen(self, placed: ModelT) -> ModelT:
        """The model, after it is known which of its sizes are beyond the fused kernels."""
        if isinstance(self.ops, FusedOps):
            self.ops.foresee(self.dtype, arguments_of(placed.model, placed.module, DTYPES[self.dtype]))
        return placed


def _set_switches(device: str) -> None:
    """Set the variables by which the libraries of a device become deterministic, before it starts; the user's stay."""
    wanted = {"cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, "npu": DETERMINISM}
    for name, value in wanted.get(device, {}).items():
        os.environ.setdefault(name, value)
