"""The MindSpore backend on its CPU target."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Tensor

from moeport.backends.base import Backend, EvaluationModel, TrainingModel, TrainingOptions
from moeport.backends.mindspore.ops import MindSporeOps
from moeport.config.training import BackendConfig
from moeport.core.model import Batch, DecoderLM, LossTerms
from moeport.core.ops import KERNELS
from moeport.errors import BackendUnavailableError


class MindSporeBackend(Backend):
    """MindSpore in PyNative mode on the CPU."""

    name = "mindspore"
    trains = False

    def __init__(self, config: BackendConfig):
        if config.device not in ("auto", "cpu"):
            raise BackendUnavailableError(f"backend.device: mindspore runs on the cpu only yet (got {config.device})")
        if config.dtype == "bfloat16":
            raise BackendUnavailableError(
                "backend.dtype: MindSpore's CPU target computes nothing in bfloat16; expected float32 or float64"
            )
        ms.set_device("CPU")
        self.ops = MindSporeOps()
        self.device = "cpu"
        self.dtype = "float32" if config.dtype == "auto" else config.dtype

    def value_and_grad(self, fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """See Backend."""

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

    def evaluation_model(self, model: DecoderLM, params: Mapping[str, np.ndarray]) -> MindSporeModel:
        """See Backend."""
        return MindSporeModel(self, model, params)

    def training_model(
        self, model: DecoderLM, params: Mapping[str, np.ndarray], options: TrainingOptions
    ) -> TrainingModel:
        """Not available yet."""
        raise BackendUnavailableError("backend.name: mindspore evaluates, and does not train yet; train with torch")

    def matmul_flops_per_second(self) -> float:
        """See Backend."""
        x = self.ops.zeros((1024, 1024), self.dtype)
        self.ops.matmul(x, x).asnumpy()
        start = time.perf_counter()
        self.ops.matmul(x, x).asnumpy()
        return 2 * 1024**3 / (time.perf_counter() - start)

    def versions(self) -> dict[str, str]:
        """See Backend."""
        return {"mindspore": ms.__version__, "numpy": np.__version__}

    def kernel_choices(self) -> dict[str, str]:
        """See Backend."""
        own = {"gelu": "mindspore.ops.gelu"}
        return {name: own.get(name, "default composition: the CPU target has no fused kernel") for name in KERNELS}


class MindSporeModel(EvaluationModel):
    """Parameters as MindSpore tensors."""

    def __init__(self, backend: MindSporeBackend, model: DecoderLM, params: Mapping[str, np.ndarray]):
        self.backend, self.model = backend, model
        self.params: dict[str, Tensor] = {}
        self.load_parameters(params)

    def evaluate(self, batch: Batch) -> LossTerms:
        """See EvaluationModel."""
        ops, dtype = self.backend.ops, self.backend.dtype
        rope = self.model.rope(ops, batch.token_BS.shape[1], dtype)
        placed = Batch(ops.from_numpy(batch.token_BS), ops.from_numpy(batch.target_BS))
        return self.model.loss(ops, self.params, placed, rope, dtype, training=False)

    def logits(self, token_BS: np.ndarray) -> np.ndarray:
        """See EvaluationModel."""
        ops, dtype = self.backend.ops, self.backend.dtype
        rope = self.model.rope(ops, token_BS.shape[1], dtype)
        ids = ops.from_numpy(token_BS)
        return ops.to_numpy(self.model.logits(ops, self.params, Batch(ids, ids), rope, dtype))

    def parameters(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """See EvaluationModel."""
        return {
            name: self.backend.ops.to_numpy(self.params[name]) for name in (self.params if names is None else names)
        }

    def load_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        """See EvaluationModel."""
        kind = self.backend.parameter_dtype
        self.params |= {name: self.backend.ops.from_numpy(value.astype(kind)) for name, value in params.items()}
