"""Hooks that report the tensors passing through any `nn.Module`, for `moeport.torch.record`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Observer = Callable[[str, str, Tensor, list[Tensor]], None]
"""Takes `input`, `given`, `output` or `gradient`, a name, a tensor, and the tensors it was computed from."""


@contextmanager
def watch(model: nn.Module, observe: Observer) -> Iterator[None]:
    """Report the tensors of a model's first forward pass and of its backward pass.

    Outputs are named `MODULE:CLASS`, and `model:CLASS` for the whole model; nested outputs are split into their
    tensors. What is given to a part of the model is named `MODULE:CLASS.x`. The gradient of an output is named after
    the output, that of a parameter after the parameter. Gradients are reported as the backward pass produces them, so
    they come in its order.

    Args:
        model: any module; it is not changed, and compiled modules are only observed from outside.
        observe: is called with each tensor.
    """
    watcher, handles = _Watcher(observe), list[Any]()
    try:
        handles.append(model.register_forward_pre_hook(watcher.before, with_kwargs=True))
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(watcher.before_part(name), with_kwargs=True))
            handles.append(module.register_forward_hook(watcher.after(name), with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not is_lazy(parameter):
                handles.append(parameter.register_post_accumulate_grad_hook(watcher.accumulated(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """The hooks, which are silent after the first pass."""

    def __init__(self, observe: Observer):
        self.observe = observe
        self.passes = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model."""
        self.passes += 1
        if self.passes == 1:
            for name, tensor in _tensors("input", (args, kwargs)):
                self.observe("input", name, tensor, [])

    def before_part(self, name: str) -> Callable[..., None]:
        """Before a module inside it."""

        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.passes <= 1:
                for label, tensor in _tensors(f"{name}:{type(module).__name__}.x", (*args, *kwargs.values())):
                    self.observe("given", label, tensor, [])

        return given

    def after(self, name: str) -> Callable[..., None]:
        """After a module."""
        observe = self.observe

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.passes > 1:
                return
            given = [tensor for _, tensor in _tensors("", (args, kwargs))]
            given += list(module.parameters(recurse=False))
            for label, tensor in _tensors(f"{name or 'model'}:{type(module).__name__}", output):
                observe("output", label, tensor, given)
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, label=label: observe("gradient", label, grad, []))

        return after

    def accumulated(self, name: str) -> Callable[[Tensor], None]:
        """After the gradient of a parameter."""

        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None and self.passes == 1:
                self.observe("gradient", name, parameter.grad, [])

        return accumulated


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested sequences, mappings and dataclasses, each with its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]" if len(value) > 1 else name, item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(name, {field: getattr(value, field) for field in value.__dataclass_fields__})


def device_of(model: nn.Module) -> torch.device:
    """The device of a model; the CPU if it has no parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
