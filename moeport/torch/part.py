"""Modules that hold parameters and router state, as any `nn.Module` does, for `moeport.torch.MoE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from moeport.backends.torch.placing import Held, held_of_sharded, is_plain
from moeport.backends.torch.private import buffers_of
from moeport.backends.torch.sharding import local
from moeport.core.parameters import InitialWeights, ParameterSpec
from moeport.core.weights import Box, Weights

WIDE = (torch.float32, torch.float64)
"""Types in which state that grows in small steps loses none of them."""


class Holder(nn.Module):
    """Parameters, and the state that a router updates itself.

    State keeps float32 whatever the module is cast to: the steps of a bias or an average vanish in narrower types. With
    float64 it is float64. Tables indexed by token id always keep float32.

    Args:
        specs: parameters and buffers by name; untrained ones become buffers.
        seed: seed of the initial values; None: they are drawn from torch's generator.
        token_counts_V: how often each token id occurs, for tables indexed by token id.
        device: where they are; None: torch's default device.
        dtype: type of the parameters; None: torch's default type.
    """

    def __init__(
        self,
        specs: Mapping[str, ParameterSpec],
        seed: int | None,
        token_counts_V: np.ndarray | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self._specs, self._seed, self._token_counts_V = dict(specs), seed, token_counts_V
        dtype = dtype or torch.get_default_dtype()
        for name, spec in self._specs.items():
            if spec.trainable:
                value = torch.empty(spec.shape, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(value, requires_grad=dtype.is_floating_point))
            else:
                self.register_buffer(name, torch.empty(spec.shape, device=device, dtype=_kept(spec, dtype)))
        self._draw()

    def reset_parameters(self) -> None:
        """Draw the initial values anew; with a `seed`, the same ones."""
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        counts_V = self._token_counts_V
        token_counts = None if counts_V is None else lambda: counts_V
        for name, spec in self._specs.items():
            value: Tensor = getattr(self, name)
            if value.device.type == "meta":
                continue
            if self._seed is not None or spec.is_table:
                seed = int(torch.randint(2**62, (), device="cpu")) if self._seed is None else self._seed
                _set(value, spec.name, InitialWeights([spec], seed, token_counts))
            elif spec.init == "normal":
                nn.init.normal_(value, std=spec.std)
            else:
                nn.init.constant_(value, 1.0 if spec.init == "ones" else 0.0)

    def own_arrays(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they are now: gathered, adapted or reparametrised by what wraps them."""
        self._widen()
        return {name: getattr(self, name) for name in self._specs}

    @property
    def state_names(self) -> list[str]:
        """Names of the buffers that a router or a capacity policy updates."""
        return [name for name, spec in self._specs.items() if spec.is_state]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Holder:
        before = {name: value for name in self._specs if (value := buffers_of(self).get(name)) is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after: Tensor = getattr(self, name)
            wanted = _kept(self._specs[name], after.dtype)
            if after.dtype is not wanted:
                buffers_of(self)[name] = value.to(after.device, wanted)
        return self

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen()

    def _widen(self) -> None:
        """Undo a cast that went past `_apply`: `load_state_dict(assign=True)`, or buffer types of FSDP1 and DDP."""
        for name in self._specs:
            value = buffers_of(self).get(name)
            if value is not None and value.dtype not in WIDE:
                buffers_of(self)[name] = value.float()


class Part(Holder):
    """One part of a layer, such as its router: a computation that is handed the parameters of this module.

    The layer calls it like any module, so hooks, `fully_shard`, parametrisations, adapters and other wrappers of
    submodules work on it.
    """

    def forward(self, *arrays: Tensor, compute: Callable[..., Any]) -> Any:
        """Returns `compute(parameters by name, *arrays)`.

        Args:
            *arrays: tokens (T, D) first.
            compute: from the layer; it returns a tensor or a tuple of tensors.
        """
        return compute(self.own_arrays(), *arrays)

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{name}={spec.shape}" for name, spec in self._specs.items())


def _kept(spec: ParameterSpec, dtype: torch.dtype) -> torch.dtype:
    """The type of an untrained parameter in a module of this type."""
    return torch.float64 if dtype is torch.float64 and not spec.is_table else torch.float32


def _set(target: Tensor, name: str, weights: Weights) -> None:
    """Draw a tensor's initial value, of one that is distributed only what is here where that is a plain part."""
    if isinstance(target, DTensor) and not is_plain(target):
        whole = torch.tensor(weights[name], device=target.device, dtype=target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
        return
    shape = weights.shape(name)
    box = Box.whole(shape)
    here = held_of_sharded(target, shape, box) if isinstance(target, DTensor) else Held(shape, box, 0, 1)
    here.fill(local(target), weights, name)
