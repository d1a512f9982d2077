"""The numpy backend: evaluation, generation and the reference of parity."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from moeport.backends.base import Backend, EvaluationModel, TrainingModel, TrainingOptions
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.comm.communicator import TIMEOUT_SECONDS, Communicator
from moeport.comm.mesh import Mesh
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.core.ops import KERNELS
from moeport.errors import BackendUnavailableError
from moeport.launch.launcher import Launch
from moeport.model.transformer import Batch, LossTerms, Transformer


def _refuse() -> NoReturn:
    raise BackendUnavailableError(
        "backend.name: numpy computes forward only and cannot train; "
        "use it for evaluation and parity, and train with backend.name: torch"
    )


class NumpyBackend(Backend):
    """numpy on the CPU."""

    name = "numpy"
    trains = False

    def __init__(self, config: BackendConfig):
        if config.device not in ("auto", "cpu"):
            raise BackendUnavailableError(f"backend.device: numpy runs on the cpu only (got {config.device})")
        if config.dtype == "bfloat16":
            raise BackendUnavailableError("backend.dtype: numpy has no bfloat16; expected float32 or float64")
        self.ops = NumpyOps()
        self.device = "cpu"
        self.dtype = "float32" if config.dtype == "auto" else config.dtype

    def value_and_grad(self, fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """Not available: numpy has no automatic differentiation."""
        _refuse()

    def evaluation_model(self, model: Transformer, params: Mapping[str, np.ndarray]) -> NumpyModel:
        """See Backend."""
        return NumpyModel(self, model, params)

    def training_model(
        self, model: Transformer, params: Mapping[str, np.ndarray], options: TrainingOptions, mesh: Mesh | None = None
    ) -> TrainingModel:
        """Not available: numpy has no automatic differentiation."""
        _refuse()

    def communicator(self, launch: Launch | None, timeout_s: float = TIMEOUT_SECONDS) -> Communicator:
        """See Backend; one process alone."""
        if launch and launch.size > 1:
            raise BackendUnavailableError(f"backend.name: numpy runs in one process (got {launch.size})")
        return SingleProcess(self.ops)

    def matmul_flops_per_second(self) -> float:
        """See Backend."""
        x = np.ones((1024, 1024), self.dtype)
        start = time.perf_counter()
        x @ x
        return 2 * 1024**3 / (time.perf_counter() - start)

    def versions(self) -> dict[str, str]:
        """See Backend."""
        return {"numpy": np.__version__}

    def kernel_choices(self) -> dict[str, str]:
        """See Backend."""
        return dict.fromkeys(KERNELS, "default composition: the reference has no fused kernels")


class NumpyModel(EvaluationModel):
    """Parameters as numpy arrays."""

    def __init__(self, backend: NumpyBackend, model: Transformer, params: Mapping[str, np.ndarray]):
        self.backend, self.model = backend, model
        self.params: dict[str, np.ndarray] = {}
        self.load_parameters(params)

    def evaluate(self, batch: Batch) -> LossTerms:
        """See EvaluationModel."""
        ops, dtype = self.backend.ops, self.backend.dtype
        rope = self.model.rope(ops, batch.token_BS.shape[1], dtype)
        return self.model.loss(ops, self.params, batch, rope, dtype, training=False)

    def logits(self, token_BS: np.ndarray) -> np.ndarray:
        """See EvaluationModel."""
        ops, dtype = self.backend.ops, self.backend.dtype
        rope = self.model.rope(ops, token_BS.shape[1], dtype)
        return self.model.logits(ops, self.params, Batch(token_BS, token_BS), rope, dtype)

    def parameters(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """See EvaluationModel."""
        return {name: self.params[name].copy() for name in (self.params if names is None else names)}

    def load_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        """See EvaluationModel."""
        self.params |= {name: value.astype(self.backend.parameter_dtype) for name, value in params.items()}
