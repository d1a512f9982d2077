"""AdamW on the parameters of a module, with clipping by the global norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from moeport.backends.torch.adamw_trial import ADAMW
from moeport.backends.torch.fused import FusedOps
from moeport.backends.torch.ops import TorchOps, name_of
from moeport.backends.torch.placing import held
from moeport.backends.torch.private import norm_of_each, scale_each
from moeport.backends.torch.sharding import from_local, local, to_whole
from moeport.comm.mesh import Mesh
from moeport.config.training import OptimizerConfig
from moeport.core.array import Array
from moeport.core.moments import MOMENTS, rule_of
from moeport.core.parameters import ParameterSpec
from moeport.core.weights import Shard

FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which torch.optim.AdamW is fused without a trial."""


def uses_fused(ops: TorchOps, dtype: torch.dtype) -> bool:
    """Whether parameters of a type are updated by the device's fused AdamW."""
    if isinstance(ops, FusedOps) and ADAMW in ops.fused_kernels:
        return ops.choice(ADAMW, name_of(dtype)).candidate is not None
    return ops.device.type in FUSED_DEVICES


class AdamW:
    """torch.optim.AdamW with its state accessible by parameter name.

    It updates the local shard of each parameter as a plain tensor: its kernels refuse lists of parameters that are
    sharded over different ranks.

    Args:
        module: holder of the parameters, already distributed.
        specs: all parameters by name; they say which ones decay.
        config: the optimizer section.
        mesh: the ranks that hold the parameters.
        ops: the operations on the device, which say whether its fused AdamW is used.
    """

    can_refuse: ClassVar[bool] = True
    """Whether its step on some devices changes nothing once a loss or a norm was not finite."""

    def __init__(
        self,
        module: nn.Module,
        specs: Mapping[str, ParameterSpec],
        config: OptimizerConfig,
        mesh: Mesh,
        ops: TorchOps,
    ):
        self.config, self.specs, self.mesh = config, specs, mesh
        self.parameters = dict(module.named_parameters())
        self.shards = {name: p if local(p) is p else local(p).detach() for name, p in self.parameters.items()}
        """The local shard of each parameter."""
        self.held = {name: held(p, specs[name], mesh) for name, p in self.parameters.items()}
        self._shares_of: dict[tuple[str, ...], Tensor] = {}
        self.device, self.kind = next((p.device, p.dtype) for p in self.shards.values())
        self.is_fused = uses_fused(ops, self.kind)
        self.refuses = self.can_refuse and self.is_fused and self.device.type in FUSED_DEVICES
        """Whether it does so here: the fused kernels of PyTorch do."""
        self.failed = torch.zeros((), dtype=torch.float32, device=self.device)
        """1 once a loss or a norm was not finite."""
        self.optimizer = self._library()

    def _library(self) -> torch.optim.Optimizer:
        """The optimiser of PyTorch that updates the local shards."""
        config, specs = self.config, self.specs
        own = [name for name in self.shards if rule_of(specs[name], config.name) == "adamw"]
        groups = [
            {"params": [self.shards[n] for n in own if specs[n].decays], "weight_decay": config.weight_decay},
            {"params": [self.shards[n] for n in own if not specs[n].decays], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=self.is_fused,
        )
        if self.refuses:
            optimizer.found_inf = self.failed  # read by its step, as torch.amp.GradScaler sets it
        return optimizer

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients by name."""
        return {name: self._whole(name, p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def watch(self, value: Tensor) -> None:
        """Refuse all further steps if a loss or a norm is not finite."""
        if self.refuses:
            bad = torch.isfinite(value.detach()).logical_not().to(self.failed.dtype)
            torch.maximum(self.failed, bad, out=self.failed)

    def gradient_norm(self) -> Array:
        """Global 2-norm over all ranks, on the device. All ranks learn whether a loss of any was not finite."""
        mesh, gradients = self.mesh, self._local_gradients()
        if mesh.world.size == 1:
            return torch.nn.utils.get_total_norm(gradients.values())
        squares = torch.stack(norm_of_each(list(gradients.values()))).square()
        square = torch.dot(squares, self._shares(tuple(gradients), squares))
        total: Any = mesh.world.all_reduce(torch.stack([square, self.failed.to(square.dtype)]))
        self.failed.copy_(total[1].clamp(max=1.0))
        return torch.sqrt(total[0])

    def _shares(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """The share of each parameter's squared norm that this rank adds: one over the number of ranks that hold it."""
        if names not in self._shares_of:
            shares = [1.0 / self.held[name].copies for name in names]
            self._shares_of = {names: torch.tensor(shares, dtype=like.dtype, device=like.device)}
        return self._shares_of[names]

    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Scale gradients to the clip norm if theirs is larger, update parameters, clear gradients."""
        self.watch(norm)
        if self.config.clip_norm is not None:
            share = torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
            scale_each(list(self._local_gradients().values()), share)
        for name, p in self.parameters.items():
            if p is not self.shards[name]:
                self.shards[name].grad = None if p.grad is None else local(p.grad)
        self.update(learning_rate)
        for p in (*self.shards.values(), *self.parameters.values()):
            p.grad = None

    def update(self, learning_rate: float) -> None:
        """Change the parameters by the gradients of their local shards, as they are."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def state(self) -> dict[str, np.ndarray]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME`; empty before the first step."""
        state = self.optimizer.state
        return {
            f"{moment}.{name}": self._whole(name, from_local(state[self.shards[name]][moment], p))
            for name, p in self.parameters.items()
            if self.shards[name] in state
            for moment in MOMENTS["adamw"]
        }

    def state_shards(self) -> Iterator[Shard]:
        """What this rank is to write of `state`; some may be empty."""
        state = self.optimizer.state
        for name, shard in self.shards.items():
            for moment in MOMENTS["adamw"] if shard in state else ():
                yield self.held[name].shard(f"{moment}.{name}", state[shard][moment])

    def load_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Restore the moments after `steps` steps."""
        self.failed.zero_()
        step_device = self.device if self.is_fused else "cpu"
        for name in self.parameters:
            if f"exp_avg.{name}" in state:
                self.optimizer.state[self.shards[name]] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32, device=step_device),
                    **{moment: self._shard(name, state, f"{moment}.{name}") for moment in MOMENTS["adamw"]},
                }

    def _local_gradients(self) -> dict[str, Tensor]:
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def _shard(self, name: str, state: Mapping[str, np.ndarray], key: str) -> Tensor:
        """The local shard of an array with the shape of a whole parameter."""
        shard = torch.empty_like(self.shards[name])
        self.held[name].fill(shard, state, key)
        return shard

    def _whole(self, name: str, x: Tensor) -> np.ndarray:
        return self.mesh.whole(self.specs[name], to_whole(x))
