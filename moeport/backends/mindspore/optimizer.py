"""AdamW with the arithmetic of torch.optim.AdamW, and clipping by the global norm."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
from mindspore import Parameter, Tensor
from mindspore import ops as msops

from moeport.backends.mindspore.placing import placed
from moeport.config.training import OptimizerConfig
from moeport.core.moments import MOMENTS
from moeport.core.parameters import ParameterSpec


def clip_scale(config: OptimizerConfig, norm: float) -> float:
    """What clipping multiplies gradients of a norm by."""
    return 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (norm + 1e-6))


class AdamW:
    """Decoupled weight decay with bias correction (Loshchilov and Hutter 2019, Algorithm 2), in place.

    MindSpore's own `nn.AdamWeightDecay` has no bias correction, and `mint.optim.AdamW` has no CPU kernel. In float32,
    the fused operator behind the former gets a rate, an eps and a decay that include the correction; in float64, where
    that operator rounds its scalars to float32, the update is composed of primitives.

    A step begins with `begin` and updates each piece of the parameters once.

    Args:
        sizes: of the pieces of parameters that are updated here, one-dimensional, by key.
        specs: of the parameter that each is a piece of, by key; they say which decay.
        config: the optimizer section.
        kind: type of parameters and moments.
    """

    def __init__(
        self, sizes: Mapping[str, int], specs: Mapping[str, ParameterSpec], config: OptimizerConfig, kind: str
    ):
        self.config = config
        self.decay = {key: config.weight_decay if specs[key].decays else 0.0 for key in sizes}
        self.steps = 0
        self.moments = {
            moment: {key: placed(f"{moment}.{key}", size, kind) for key, size in sizes.items()}
            for moment in MOMENTS["adamw"]
        }
        """Of each piece by its key, by the name of the moment."""
        self.fused = msops.AdamWeightDecay()

    def begin(self, learning_rate: float, norm: float) -> None:
        """Begin a step, in which gradients are scaled to the clip norm if theirs is larger."""
        self.steps += 1
        self.learning_rate, self.scale = learning_rate, clip_scale(self.config, norm)

    def update(self, key: str, p: Parameter, gradient: Tensor) -> None:
        """Update a piece of a parameter in place."""
        config, learning_rate = self.config, self.learning_rate
        correction1, correction2 = 1 - config.beta1**self.steps, 1 - config.beta2**self.steps
        if self.scale < 1.0:
            gradient = gradient * Tensor(self.scale, gradient.dtype)
        mean, square = self.moments["exp_avg"][key], self.moments["exp_avg_sq"][key]
        if p.dtype == ms.float32:
            rate = learning_rate * correction2**0.5 / correction1
            eps, decay = config.eps * correction2**0.5, self.decay[key] * learning_rate / rate
            self.fused(p, mean, square, rate, config.beta1, config.beta2, eps, decay, gradient)
        else:
            self._composed(p, mean, square, gradient, self.decay[key], correction1, correction2)

    def _composed(
        self,
        p: Parameter,
        mean: Parameter,
        square: Parameter,
        gradient: Tensor,
        decay: float,
        correction1: float,
        correction2: float,
    ) -> None:
        def number(value: float) -> Tensor:
            return Tensor(value, p.dtype)

        config, learning_rate = self.config, self.learning_rate
        new_mean = mean * number(config.beta1) + gradient * number(1 - config.beta1)
        new_square = square * number(config.beta2) + gradient * gradient * number(1 - config.beta2)
        root = msops.sqrt(new_square) / number(correction2**0.5) + number(config.eps)
        decayed = p * number(1 - learning_rate * decay)
        msops.assign(p, decayed - number(learning_rate / correction1) * new_mean / root)
        msops.assign(mean, new_mean)
        msops.assign(square, new_square)
