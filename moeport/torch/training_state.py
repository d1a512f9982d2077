"""What training changes besides parameters, for `moeport.torch.record`: optimiser state and untrained tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeport.parity.recording import Kind

Labelled = Iterator[tuple[str, Kind, Tensor]]
"""Name, kind and tensor of each record."""


def untrained(model: nn.Module) -> Labelled:
    """Buffers and parameters without a gradient, such as running averages and the bias of a router."""
    for label, tensor in model.named_parameters():
        if not tensor.requires_grad:
            yield f"state:{label}", "state", tensor
    for label, tensor in model.named_buffers():
        yield f"state:{label}", "state", tensor


def optimizer_work(model: nn.Module, optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor]) -> Labelled:
    """What the optimiser keeps of each parameter, by the names in its state, and how the parameters have changed.

    Args:
        model: the model.
        optimizer: its optimiser.
        before: copies of the parameters before the pass, by name.
    """
    named = dict(model.named_parameters())
    kept = {label: optimizer.state[p] for label, p in named.items() if p in optimizer.state}
    keys = dict.fromkeys(key for state in kept.values() for key in state)
    for key in keys:
        for label, state in kept.items():
            if isinstance(value := state.get(key), Tensor):
                is_moment = value.shape == named[label].shape and value.dim() > 0
                yield f"{key}:{label}", "moment" if is_moment else "state", value
    for label, p in named.items():
        if p.requires_grad:
            yield f"update:{label}", "update", p.detach() - before[label]


def hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The class of an optimiser and the options of its groups of parameters, as the config of a recording."""
    groups = {
        str(number): {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        for number, group in enumerate(optimizer.param_groups)
    }
    return {"optimizer": {"class": type(optimizer).__name__, "groups": groups}}


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
