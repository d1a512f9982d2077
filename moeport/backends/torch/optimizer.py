"""AdamW on the parameters of a module, with clipping by the global norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from moeport.config.training import OptimizerConfig
from moeport.core.ops import Array
from moeport.core.parameters import ParameterSpec

FUSED_DEVICES = ("cpu", "cuda")
"""Devices for which torch.optim.AdamW has a fused kernel."""


class AdamW:
    """torch.optim.AdamW whose state is known by parameter name.

    Args:
        module: holder of the parameters.
        specs: says which parameters decay.
        config: the optimizer section.
    """

    def __init__(self, module: nn.Module, specs: Iterable[ParameterSpec], config: OptimizerConfig):
        self.config = config
        self.parameters = dict(module.named_parameters())
        decaying = {spec.name for spec in specs if spec.decays}
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if name in decaying],
                "weight_decay": config.weight_decay,
            },
            {
                "params": [p for name, p in self.parameters.items() if name not in decaying],
                "weight_decay": 0.0,
            },
        ]
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=self.device.type in FUSED_DEVICES,
        )

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients by name."""
        return {name: p.grad.detach().cpu().numpy().copy() for name, p in self.parameters.items() if p.grad is not None}

    def gradient_norm(self) -> Array:
        """Global 2-norm, on the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, learning_rate: float, norm: Array) -> None:
        """Scale gradients to the clip norm if theirs is larger, update, clear."""
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, np.ndarray]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME`; empty before the first step."""
        return {
            f"{moment}.{name}": self.optimizer.state[p][moment].detach().cpu().numpy().copy()
            for name, p in self.parameters.items()
            if p in self.optimizer.state
            for moment in ("exp_avg", "exp_avg_sq")
        }

    def load_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Restore the moments after `steps` steps."""
        fused_device = self.device if self.device.type in FUSED_DEVICES else "cpu"
        for name, p in self.parameters.items():
            if f"exp_avg.{name}" in state:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32, device=fused_device),
                    "exp_avg": torch.tensor(state[f"exp_avg.{name}"], device=p.device, dtype=p.dtype),
                    "exp_avg_sq": torch.tensor(state[f"exp_avg_sq.{name}"], device=p.device, dtype=p.dtype),
                }
