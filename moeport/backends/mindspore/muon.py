"""Muon on matrices, with the arithmetic of `moeport.backends.torch.muon`, and AdamW on other parameters."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
from mindspore import Parameter, Tensor
from mindspore import ops as msops
from typing_extensions import override

from moeport.backends.mindspore.device import is_on_cpu
from moeport.backends.mindspore.optimizer import AdamW
from moeport.backends.mindspore.placing import placed
from moeport.config.training import OptimizerConfig
from moeport.core.moments import rule_of
from moeport.core.muon import COEFFICIENTS, EPS, ITERATIONS, batch_shape, rate_factor
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


class Muon(AdamW):
    """Muon (see `moeport.core.muon`); what it does not update is left to AdamW.

    Args:
        sizes: of the pieces of parameters that are updated here, one-dimensional, by key; of a matrix all or nothing.
        specs: of the parameter that each is a piece of, by key; they say which are matrices, and which decay.
        config: the optimizer section.
        kind: type of parameters and moments.
        dtype: compute type, in which an accelerator iterates; the CPU does in the type of the parameters.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        specs: Mapping[str, ParameterSpec],
        config: OptimizerConfig,
        kind: str,
        dtype: str,
    ):
        matrices = [key for key in sizes if rule_of(specs[key], config.name) == "muon"]
        super().__init__({key: size for key, size in sizes.items() if key not in matrices}, specs, config, kind)
        self.shapes = {key: batch_shape(specs[key], specs[key].shape)[1:] for key in matrices}
        """(rows, columns) of the matrices of each."""
        self.adamw_share = (config.muon.adamw_learning_rate or config.learning_rate) / config.learning_rate
        self.iterates_in = None if is_on_cpu() else getattr(ms, dtype)
        self.moments["momentum_buffer"] = {key: placed(f"momentum_buffer.{key}", sizes[key], kind) for key in matrices}

    @override
    def begin(self, learning_rate: float, norm: float) -> None:
        super().begin(learning_rate * self.adamw_share, norm)
        self.muon_rate = learning_rate

    @override
    def update(self, key: str, p: Parameter, gradient: Tensor) -> None:
        if key not in self.shapes:
            super().update(key, p, gradient)
            return
        config, kind, momentum = self.config, p.dtype, self.moments["momentum_buffer"][key]
        beta = config.muon.momentum
        if self.scale < 1.0:
            gradient = gradient * Tensor(self.scale, kind)
        old, new = Tensor(beta, kind), Tensor(1 - beta, kind)
        moved = momentum * old + gradient * new
        msops.assign(momentum, moved)
        update = self._scaled(key, gradient * new + moved * old if config.muon.nesterov else moved)
        decayed = p * Tensor(1 - self.muon_rate * config.weight_decay, kind)
        msops.assign(p, decayed - Tensor(self.muon_rate, kind) * update)

    def _scaled(self, key: str, direction: Tensor) -> Tensor:
        """The orthogonalised direction times the factor of the rate, one-dimensional."""
        rows, columns = self.shapes[key]
        factor = rate_factor(rows, columns, self.config.muon.adjust_rate)
        matrices = direction.reshape((-1, rows, columns))
        out = orthogonalized(matrices if self.iterates_in is None else matrices.astype(self.iterates_in))
        return out.astype(direction.dtype).reshape(-1) * Tensor(factor, direction.dtype)
