"""Muon on the matrices of a module, and AdamW on its other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from moeport.backends.torch.ops import DTYPES, TorchOps
from moeport.backends.torch.optimizer import AdamW
from moeport.backends.torch.sharding import from_local, local
from moeport.comm.mesh import Mesh
from moeport.config.training import OptimizerConfig
from moeport.core.moments import rule_of
from moeport.core.muon import COEFFICIENTS, EPS, ITERATIONS, batch_shape, rate_factor
from moeport.core.parameters import ParameterSpec
from moeport.core.weights import Shard


def orthogonalized(x_BRC: Tensor) -> Tensor:
    """Each matrix with its singular values moved towards 1, in the type of `x_BRC`.

    The arithmetic of torch.optim.Muon, which takes one matrix and always computes in bfloat16.
    """
    a, b, c = COEFFICIENTS
    tall = x_BRC.shape[1] > x_BRC.shape[2]
    x = x_BRC.mT if tall else x_BRC
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(AdamW):
    """Muon (see `moeport.core.muon`); what it does not update is left to AdamW.

    The iterations need whole matrices. Experts on this rank are whole, also where FSDP2 divides those of a layer by
    expert. Other sharded matrices are gathered, one parameter at a time, and every rank iterates on them.

    Args: as for AdamW, and

        dtype: compute type, in which an accelerator iterates; the CPU does in the type of the parameters.
    """

    can_refuse: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        specs: Mapping[str, ParameterSpec],
        config: OptimizerConfig,
        mesh: Mesh,
        ops: TorchOps,
        dtype: str,
    ):
        super().__init__(module, specs, config, mesh, ops)
        self.iterates_in = self.kind if self.device.type == "cpu" else DTYPES[dtype]
        self.matrices = [name for name in self.shards if rule_of(specs[name], config.name) == "muon"]
        self.momenta: dict[str, Tensor] = {}
        """Of the local shards; empty before the first step."""
        self.adamw_share = (config.muon.adamw_learning_rate or config.learning_rate) / config.learning_rate

    @override
    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        super().update(learning_rate * self.adamw_share)
        muon = self.config.muon
        for name in self.matrices:
            p = self.shards[name]
            if p.grad is None:
                continue
            momentum = self.momenta.setdefault(name, torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - muon.momentum)
            direction = p.grad.lerp(momentum, muon.momentum) if muon.nesterov else momentum
            p.mul_(1 - learning_rate * self.config.weight_decay)
            p.add_(self._scaled(name, direction), alpha=-learning_rate)

    def _scaled(self, name: str, direction: Tensor) -> Tensor:
        """The local shard of the orthogonalised direction, times the factor of the rate."""
        spec, whole = self.specs[name], direction
        sharded = from_local(direction, self.parameters[name])
        gathers = isinstance(sharded, DTensor) and not (spec.is_expert and sharded.placements[-1].is_shard(0))
        if gathers:
            whole = sharded.full_tensor()
        shape = batch_shape(spec, whole.shape)
        factor = rate_factor(*shape[1:], self.config.muon.adjust_rate)
        out = orthogonalized(whole.reshape(shape).to(self.iterates_in)).to(direction.dtype)
        out = (out * factor).reshape(whole.shape)
        if gathers:
            out = local(distribute_tensor(out, sharded.device_mesh, sharded.placements, src_data_rank=None))
        return out

    @override
    def state(self) -> dict[str, np.ndarray]:
        """Also `momentum_buffer.NAME` of the matrices."""
        momenta = {
            f"momentum_buffer.{name}": self._whole(name, from_local(momentum, self.parameters[name]))
            for name, momentum in self.momenta.items()
        }
        return super().state() | momenta

    @override
    def state_shards(self) -> Iterator[Shard]:
        yield from super().state_shards()
        for name, momentum in self.momenta.items():
            yield self.held[name].shard(f"momentum_buffer.{name}", momentum)

    @override
    def load_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        super().load_state(state, steps)
        for name in self.matrices:
            key = f"momentum_buffer.{name}"
            if key in state:
                self.momenta[name] = self._shard(name, state, key)
