"""torch.optim.Adafactor on the parameters of a module, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.optimizer import AdamW
from moeport.backends.torch.placing import Held, held
from moeport.comm.mesh import Mesh
from moeport.config.training import OptimizerConfig
from moeport.core.moments import MOMENTS, moment_of, rule_of
from moeport.core.parameters import ParameterSpec
from moeport.core.weights import Shard
from moeport.errors import UserError


class Adafactor(AdamW):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) of PyTorch.

    Its updates are normalised by the root mean squares of a whole matrix and of its update. Each expert, and of SwiGLU
    each of gate and up projection, is a matrix of its own, so what a rank holds does not matter as long as it holds
    matrices whole. A vector has a second moment of its own.

    Args: as for AdamW.

    Raises UserError if FSDP2 has divided a parameter among ranks.
    """

    can_refuse: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        specs: Mapping[str, ParameterSpec],
        config: OptimizerConfig,
        mesh: Mesh,
        ops: TorchOps,
    ):
        divided = next((name for name, p in module.named_parameters() if _is_divided(p)), None)
        if divided:
            raise UserError(
                f"parallelism.shard: divides {divided} among ranks, but optimizer.name adafactor normalises each "
                "update by the whole matrix; expected parallelism.shard: false, which leaves experts divided by "
                "parallelism.expert, or optimizer.name adamw or muon"
            )
        super().__init__(module, specs, config, mesh, ops)

    @override
    def _library(self) -> torch.optim.Optimizer:
        self.matrices = {name: self._matrices(name, shard.detach()) for name, shard in self.shards.items()}
        """What each parameter is updated by: views of its matrices, or itself if it is a vector."""
        config, options = self.config, self.config.adafactor
        groups = [
            {"params": [x for n, views in self.matrices.items() if self.specs[n].decays == decays for x in views]}
            for decays in (True, False)
        ]
        decay = (config.weight_decay, 0.0)
        return torch.optim.Adafactor(
            [group | {"weight_decay": w} for group, w in zip(groups, decay, strict=True) if group["params"]],
            lr=config.learning_rate,
            beta2_decay=-options.beta2_decay,
            eps=(options.eps, options.least_scale),
            d=options.clip_threshold,
            foreach=False,
        )

    def _matrices(self, name: str, x: Tensor) -> list[Tensor]:
        """Views of the matrices of a parameter, or of a contiguous array of its shape; a vector is its only one."""
        if x.dim() < 2:
            return [x]
        rows, columns = x.shape[-2] // max(1, self.specs[name].matrices), x.shape[-1]
        return list(x.view(-1, rows, columns).unbind(0))

    @override
    def update(self, learning_rate: float) -> None:
        for name, views in self.matrices.items():
            gradient = self.shards[name].grad
            if gradient is not None:
                for view, part in zip(views, self._matrices(name, gradient.contiguous()), strict=True):
                    view.grad = part
        super().update(learning_rate)
        for views in self.matrices.values():
            for view in views:
                view.grad = None

    @override
    def state(self) -> dict[str, np.ndarray]:
        """`row_var.NAME` and `col_var.NAME` of matrices, `variance.NAME` of vectors; empty before the first step."""
        return {
            f"{moment}.{name}": self.mesh.whole(moment_of(self.specs[name], moment), x.cpu().numpy())
            for name, moment, x in self._moments()
        }

    @override
    def state_shards(self) -> Iterator[Shard]:
        for name, moment, x in self._moments():
            yield self._held(name, moment).shard(f"{moment}.{name}", x)

    @override
    def load_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        self.failed.zero_()
        for name, views in self.matrices.items():
            moments = self._moments_of(name)
            if f"{moments[0]}.{name}" not in state:
                continue
            read = {moment: self._read(name, moment, state) for moment in moments}
            for number, view in enumerate(views):
                self.optimizer.state[view] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32),
                    **{moment: parts[number].clone() for moment, parts in read.items()},
                }

    def _read(self, name: str, moment: str, state: Mapping[str, np.ndarray]) -> list[Tensor]:
        """A moment of each matrix, in the shape in which PyTorch keeps it."""
        part = self._held(name, moment)
        x = torch.empty(part.box.shape, dtype=self.kind, device=self.device)
        part.fill(x, state, f"{moment}.{name}")
        if moment == "variance":
            return [x]
        number = len(self.matrices[name])
        return list(x.reshape(number, -1, 1) if moment == "row_var" else x.reshape(number, 1, -1))

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name, moment and what is here of it, of every parameter that was updated."""
        for name, views in self.matrices.items():
            if views[0] not in self.optimizer.state:
                continue
            for moment in self._moments_of(name):
                parts = [self.optimizer.state[view][moment] for view in views]
                yield (
                    name,
                    moment,
                    torch.cat([x.reshape(-1) for x in parts]).reshape(self._held(name, moment).box.shape),
                )

    def _moments_of(self, name: str) -> tuple[str, ...]:
        return MOMENTS[rule_of(self.specs[name], "adafactor")]

    def _held(self, name: str, moment: str) -> Held:
        return held(self.parameters[name], moment_of(self.specs[name], moment), self.mesh)


def _is_divided(x: Tensor) -> bool:
    """Whether other ranks hold other parts of a tensor, and not copies of it."""
    return isinstance(x, DTensor) and any(
        placement.is_shard() and x.device_mesh.size(dim) > 1 for dim, placement in enumerate(x.placements)
    )
