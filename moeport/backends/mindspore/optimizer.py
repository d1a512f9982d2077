"""AdamW with the arithmetic of torch.optim.AdamW, and clipping by the global norm."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore import ops as msops

from moeport.backends.mindspore.ops import numpy_type
from moeport.config.training import OptimizerConfig
from moeport.core.parameters import ParameterSpec


def clip_scale(config: OptimizerConfig, norm: float) -> float:
    """What clipping multiplies gradients of a norm by."""
    return 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (norm + 1e-6))


class AdamW:
    """Decoupled weight decay with bias correction (Loshchilov and Hutter 2019, Algorithm 2), in place.

    MindSpore's own `nn.AdamWeightDecay` has no bias correction, and `mint.optim.AdamW` has no CPU kernel. In float32,
    the fused operator behind the former gets a rate, an eps and a decay that include the correction; in float64, where
    that operator rounds its scalars to float32, the update is composed of primitives.

    Args:
        parameters: trained parameters by name, one-dimensional; updated in place.
        specs: they say which parameters decay.
        config: the optimizer section.
    """

    def __init__(self, parameters: Mapping[str, Parameter], specs: list[ParameterSpec], config: OptimizerConfig):
        self.config = config
        self.parameters = parameters
        self.decay = {spec.name: config.weight_decay if spec.decays else 0.0 for spec in specs}
        self.steps = 0
        self.moments = {
            f"{moment}.{name}": Parameter(msops.zeros_like(p), name=f"{moment}.{name}")
            for name, p in parameters.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        self.fused = msops.AdamWeightDecay()

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, norm: float) -> None:
        """Scale gradients to the clip norm if theirs is larger, then update."""
        config = self.config
        self.steps += 1
        correction1, correction2 = 1 - config.beta1**self.steps, 1 - config.beta2**self.steps
        scale = clip_scale(config, norm)
        for name, p in self.parameters.items():
            gradient = gradients[name]
            if scale < 1.0:
                gradient = gradient * Tensor(scale, gradient.dtype)
            mean, square = self.moments[f"exp_avg.{name}"], self.moments[f"exp_avg_sq.{name}"]
            if p.dtype == ms.float32:
                rate = learning_rate * correction2**0.5 / correction1
                eps, decay = config.eps * correction2**0.5, self.decay[name] * learning_rate / rate
                self.fused(p, mean, square, rate, config.beta1, config.beta2, eps, decay, gradient)
            else:
                self._composed(p, mean, square, gradient, learning_rate, self.decay[name], correction1, correction2)

    def _composed(
        self,
        p: Parameter,
        mean: Parameter,
        square: Parameter,
        gradient: Tensor,
        learning_rate: float,
        decay: float,
        correction1: float,
        correction2: float,
    ) -> None:
        def number(value: float) -> Tensor:
            return Tensor(value, p.dtype)

        config = self.config
        new_mean = mean * number(config.beta1) + gradient * number(1 - config.beta1)
        new_square = square * number(config.beta2) + gradient * gradient * number(1 - config.beta2)
        root = msops.sqrt(new_square) / number(correction2**0.5) + number(config.eps)
        decayed = p * number(1 - learning_rate * decay)
        msops.assign(p, decayed - number(learning_rate / correction1) * new_mean / root)
        msops.assign(mean, new_mean)
        msops.assign(square, new_square)

    def state(self) -> dict[str, np.ndarray]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME`, one-dimensional; empty before the first step."""
        return {name: moment.asnumpy().copy() for name, moment in self.moments.items()} if self.steps else {}

    def load_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Restore the moments after `steps` steps."""
        self.steps = steps
        for name, moment in self.moments.items():
            if name in state:
                values = state[name].reshape(-1).astype(numpy_type(moment.dtype))
                msops.assign(moment, Tensor(values))
