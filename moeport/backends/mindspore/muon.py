"""Muon on matrices, with the arithmetic of `moeport.backends.torch.muon`, and AdamW on other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore import ops as msops

from moeport.backends.mindspore.device import is_on_cpu
from moeport.backends.mindspore.ops import numpy_type
from moeport.backends.mindspore.optimizer import AdamW, clip_scale
from moeport.config.training import OptimizerConfig
from moeport.core.muon import COEFFICIENTS, EPS, ITERATIONS, batch_shape, rate_factor, rule_of
from moeport.core.parameters import ParameterSpec


def orthogonalized(x_BRC: Tensor) -> Tensor:
    """Each matrix with its singular values moved towards 1, in the type of `x_BRC`."""
    kind = x_BRC.dtype
    a, b, c = (Tensor(value, kind) for value in COEFFICIENTS)
    product, with_second = msops.BatchMatMul(), msops.BatchMatMul(transpose_b=True)
    tall = x_BRC.shape[1] > x_BRC.shape[2]
    x = x_BRC.swapaxes(1, 2) if tall else x_BRC
    squares = (x * x).reshape((x.shape[0], -1)).sum(axis=1).reshape((-1, 1, 1))
    x = x / msops.maximum(msops.sqrt(squares), Tensor(EPS, kind))
    for _ in range(ITERATIONS):
        gram = with_second(x, x)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.swapaxes(1, 2) if tall else x


class Muon:
    """Muon (see `moeport.core.muon`); what it does not update is left to AdamW.

    Args:
        parameters: trained parameters by name, one-dimensional; updated in place.
        specs: they say which parameters are matrices, and which decay.
        config: the optimizer section.
        shapes: of the parameters that are here.
        dtype: compute type, in which an accelerator iterates; the CPU does in the type of the parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        specs: list[ParameterSpec],
        config: OptimizerConfig,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
    ):
        self.config, self.parameters = config, parameters
        self.specs = {spec.name: spec for spec in specs if rule_of(spec, config.name) == "muon"}
        self.shapes = {name: batch_shape(spec, shapes[name]) for name, spec in self.specs.items()}
        """(matrices, rows, columns) of each."""
        self.adamw = AdamW({name: p for name, p in parameters.items() if name not in self.specs}, specs, config)
        self.adamw_share = (config.muon.adamw_learning_rate or config.learning_rate) / config.learning_rate
        self.iterates_in = None if is_on_cpu() else getattr(ms, dtype)
        self.momenta = {
            name: Parameter(msops.zeros_like(parameters[name]), name=f"momentum_buffer.{name}") for name in self.specs
        }

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, norm: float) -> None:
        """Scale gradients to the clip norm if theirs is larger, then update."""
        self.adamw.step(gradients, learning_rate * self.adamw_share, norm)
        config, scale = self.config, clip_scale(self.config, norm)
        beta = config.muon.momentum
        for name, momentum in self.momenta.items():
            p, gradient = self.parameters[name], gradients[name]
            kind = p.dtype
            if scale < 1.0:
                gradient = gradient * Tensor(scale, kind)
            old, new = Tensor(beta, kind), Tensor(1 - beta, kind)
            moved = momentum * old + gradient * new
            msops.assign(momentum, moved)
            update = self._scaled(name, gradient * new + moved * old if config.muon.nesterov else moved)
            decayed = p * Tensor(1 - learning_rate * config.weight_decay, kind)
            msops.assign(p, decayed - Tensor(learning_rate, kind) * update)

    def _scaled(self, name: str, direction: Tensor) -> Tensor:
        """The orthogonalised direction times the factor of the rate, one-dimensional."""
        shape = self.shapes[name]
        factor = rate_factor(shape[1], shape[2], self.config.muon.adjust_rate)
        matrices = direction.reshape(shape)
        out = orthogonalized(matrices if self.iterates_in is None else matrices.astype(self.iterates_in))
        return out.astype(direction.dtype).reshape(-1) * Tensor(factor, direction.dtype)

    def state(self) -> dict[str, np.ndarray]:
        """AdamW's, and `momentum_buffer.NAME` of the matrices, one-dimensional; empty before the first step."""
        if not self.adamw.steps:
            return {}
        momenta = {f"momentum_buffer.{name}": momentum.asnumpy().copy() for name, momentum in self.momenta.items()}
        return self.adamw.state() | momenta

    def load_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Restore the moments after `steps` steps."""
        self.adamw.load_state(state, steps)
        for name, momentum in self.momenta.items():
            if f"momentum_buffer.{name}" in state:
                values = state[f"momentum_buffer.{name}"].reshape(-1).astype(numpy_type(momentum.dtype))
                msops.assign(momentum, Tensor(values))
