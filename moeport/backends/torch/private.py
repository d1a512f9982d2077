"""The names of PyTorch that are not public, all of them; nothing else in moeport uses any.

PyTorch has no public counterpart of what they are used for. Where a release lacks one, the import of this module raises
BackendUnavailableError, which names it, and so `moeport doctor`, every run and `moeport.torch` do at their start.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from moeport.backends.private import require

TRIED = "2.13.0"
"""The release that the whole suite runs with."""

NAMES = {
    "torch:Tensor._base": "tells a view from an array of its own",
    "torch:Tensor._version": "sees that an array has changed",
    "torch:_foreach_add_": "adds arrays in one launch",
    "torch:_foreach_copy_": "copies arrays in one launch",
    "torch:_foreach_mul_": "scales arrays in one launch",
    "torch:_foreach_norm": "takes the norms of arrays in one launch",
    "torch:ops.aten._unsafe_view": "returns an array as a result of its own",
    "torch._C:_current_graph_task_id": "sees that a forward pass is repeated by a checkpoint",
    "torch._C._autograd:_top_saved_tensors_default_hooks": "sees that a forward pass is repeated by a checkpoint",
    "torch._C._functorch:TransformType.Vmap": "tells torch.vmap from other transforms",
    "torch._C._functorch:get_interpreter_stack": "lists the transforms of torch.func that are active",
    "torch._C._functorch:get_unwrapped": "reads an array inside a transform of torch.func",
    "torch._C._functorch:is_functorch_wrapped_tensor": "reads an array inside a transform of torch.func",
    "torch._C._functorch:peek_interpreter_stack": "sees that a transform of torch.func is active",
    "torch._functorch.pyfunctorch:temporarily_clear_interpreter_stack": "computes outside of transforms of torch.func",
    "torch.autograd:_profiler_enabled": "sees that a profile is written",
    "torch.compiler:_is_exporting_flag": "tells torch.export from torch.compile, also in PyTorch 2.11",
    "torch.nn:Module._apply": "keeps the types of buffers where a module is cast",
    "torch.nn:Module._buffers": "replaces a buffer by one of another type",
    "torch.nn:Module._load_from_state_dict": "keeps the types of buffers where a module is loaded",
    "torch.nn:Module._replicate_for_data_parallel": "tells the replicas of nn.DataParallel",
    "torch.utils.checkpoint:_checkpoint_hook": "sees that a forward pass is repeated by a checkpoint",
    "torch.utils.checkpoint:_recomputation_hook": "sees that a forward pass is repeated by a checkpoint",
}
"""What each is used for, by module and attribute."""

require("PyTorch", torch.__version__, NAMES, f"install it with: pip install torch=={TRIED}")

from torch._C import _functorch  # noqa: E402
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # noqa: E402


def is_view(x: Tensor) -> bool:
    """Whether an array is a view of another."""
    return x._base is not None


def viewed(x: Tensor) -> Tensor:
    """The array that this one is a view of; itself if it is none."""
    return x if x._base is None else x._base


def version_of(x: Tensor) -> int:
    """A number that each change of the array in place increases."""
    return x._version


def result_of_its_own(x: Tensor) -> Tensor:
    """The same memory, not as a view, with a gradient."""
    same: Tensor = torch.ops.aten._unsafe_view(x, x.shape)
    return same


def add_each(into: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to each array another of its shape, in place."""
    torch._foreach_add_(into, others)


def copy_each(into: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Overwrite each array by another of its shape, cast to its type."""
    torch._foreach_copy_(into, others)


def scale_each(into: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each array by a scalar, in place."""
    torch._foreach_mul_(into, factor)


def norm_of_each(arrays: Sequence[Tensor]) -> Sequence[Tensor]:
    """The 2-norm of each array."""
    norms: Sequence[Tensor] = torch._foreach_norm(arrays)
    return norms


def is_profiled() -> bool:
    """Whether torch.profiler is recording."""
    recording: bool = torch.autograd._profiler_enabled()
    return recording


def inside_torch_func() -> bool:
    """Whether a transform such as torch.func.grad is active, which takes no autograd function of our kind."""
    return _functorch.peek_interpreter_stack() is not None


def outside_torch_func() -> AbstractContextManager[None]:
    """A block in which no transform of torch.func is active."""
    block: AbstractContextManager[None] = temporarily_clear_interpreter_stack()
    return block


def inside_vmap() -> bool:
    """Whether torch.vmap is active."""
    interpreters = _functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == _functorch.TransformType.Vmap for interpreter in interpreters)


def unwrapped(x: Tensor) -> Tensor:
    """The array inside those that transforms of torch.func have made of it."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def is_exporting() -> bool:
    """Whether torch.export traces; in PyTorch 2.11 the public function is true under torch.compile too."""
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def is_repeated() -> bool:
    """Whether this forward pass repeats an earlier one for `torch.utils.checkpoint(use_reentrant=False)`.

    With use_reentrant=True the earlier pass ran without gradients and was not counted, so its repetition is.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) or ()
    names = [getattr(hook, "__qualname__", "") for hook in hooks]
    if any("_recomputation_hook" in name for name in names):
        return True
    # A checkpoint inside one that is repeated has its own hooks on top.
    return torch._C._current_graph_task_id() != -1 and any("_checkpoint_hook" in name for name in names)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module alone by name, to be read and replaced."""
    return module._buffers


def is_replica(module: nn.Module) -> bool:
    """Whether a module is one of nn.DataParallel's copies."""
    return getattr(module, "_is_replica", False)
