"""The numpy backend: evaluation, generation and the reference of parity."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from typing_extensions import override

from moeport.backends.base import Backend, TrainingModel, TrainingOptions
from moeport.backends.numpy_ref.model import NumpyEvaluationModel
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.comm.communicator import TIMEOUT_SECONDS, Communicator
from moeport.comm.job import Job
from moeport.comm.mesh import Mesh
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.core.ops import KERNELS
from moeport.errors import BackendUnavailableError
from moeport.launch.launcher import Launch
from moeport.model.transformer import Transformer


def _refuse() -> NoReturn:
    raise BackendUnavailableError(
        "backend.name: numpy computes forward only and cannot train; "
        "use it for evaluation and parity, and train with backend.name: torch"
    )


class NumpyBackend(Backend):
    """numpy on the CPU."""

    name = "numpy"

    def __init__(self, config: BackendConfig):
        if config.device not in ("auto", "cpu"):
            raise BackendUnavailableError(f"backend.device: numpy runs on the cpu only (got {config.device})")
        if config.dtype == "bfloat16":
            raise BackendUnavailableError("backend.dtype: numpy has no bfloat16; expected float32 or float64")
        self.ops: NumpyOps = NumpyOps()
        self.device = "cpu"
        self.dtype = "float32" if config.dtype == "auto" else config.dtype

    def value_and_grad(self, fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """Not available: numpy has no automatic differentiation."""
        _refuse()

    @override
    def evaluation_model(self, model: Transformer, params: Mapping[str, np.ndarray]) -> NumpyEvaluationModel:
        return NumpyEvaluationModel(self.ops, self.dtype, model, params)

    def training_model(
        self, model: Transformer, params: Mapping[str, np.ndarray], options: TrainingOptions, mesh: Mesh | None = None
    ) -> TrainingModel:
        """Not available: numpy has no automatic differentiation."""
        _refuse()

    @override
    def communicator(
        self, launch: Launch | None, timeout_s: float = TIMEOUT_SECONDS, job: Job | None = None
    ) -> Communicator:
        """numpy runs in one process only."""
        if launch and launch.size > 1:
            raise BackendUnavailableError(f"backend.name: numpy runs in one process (got {launch.size})")
        return SingleProcess(self.ops)

    @override
    def matmul_flops_per_second(self) -> float:
        x = np.ones((1024, 1024), self.dtype)
        start = time.perf_counter()
        x @ x
        return 2 * 1024**3 / (time.perf_counter() - start)

    @override
    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    @override
    def kernel_choices(self) -> dict[str, str]:
        return dict.fromkeys(KERNELS, "default composition: the reference has no fused kernels")
