"""Copies of parameters in the compute type, cast once per update rather than at every use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeport.backends.torch.module import TransformerModule
from moeport.backends.torch.private import copy_each
from moeport.core.parameters import ParameterSpec


class ComputeCopies:
    """The copies that a module uses in place of its parameters; none if parameters have the compute type already.

    They cost 2 bytes per parameter in bfloat16. Gradients reach the copies in the compute type and are added to those
    of the parameters. That gives the same bits as a cast at every use, unless a parameter is used more than once in a
    pass: then its gradients are summed in the compute type.

    Parameters that `fully_shard` divides are left out, since it casts them as it gathers them.

    Args:
        module: already distributed.
        specs: all parameters by name; they say which are used in the compute type.
        dtype: the compute type.
        trains: whether gradients are wanted.
    """

    def __init__(self, module: TransformerModule, specs: Mapping[str, ParameterSpec], dtype: torch.dtype, trains: bool):
        self.parameters: dict[str, nn.Parameter] = {
            name: p
            for name, p in module.named_parameters()
            if specs[name].in_compute_type and p.dtype != dtype and not isinstance(p, DTensor)
        }
        self.copies = {
            name: p.detach().to(dtype).requires_grad_(trains and p.requires_grad) for name, p in self.parameters.items()
        }
        for name, copy in self.copies.items():
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(partial(self._pass_on, name))
        module.use_copies(self.copies)

    @torch.no_grad()
    def refresh(self, names: Iterable[str] | None = None) -> None:
        """Cast parameters after they have changed: those in `names`, by default all."""
        changed = self.copies if names is None else self.copies.keys() & names
        if changed:
            copy_each([self.copies[name] for name in changed], [self.parameters[name] for name in changed])

    def _pass_on(self, name: str, copy: Tensor) -> None:
        """Add the gradient that has reached a copy to that of its parameter, at once: its memory serves the next."""
        gradient, parameter = copy.grad, self.parameters[name]
        copy.grad = None
        if gradient is None:
            return
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)
        else:
            parameter.grad.add_(gradient)
