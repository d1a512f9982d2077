"""How a reference refuses a call."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class RefusedError(RuntimeError):
    """The documentation of the operator forbids this call."""


class NotEmulatedError(RuntimeError):
    """The documentation allows this call, but there is no reference for it."""


def need(condition, rule):
    """The rule holds, or the call is refused."""
    if not condition:
        raise RefusedError(f"forbidden: {rule}")


def emulated(condition, what):
    """The call is one for which there is a reference."""
    if not condition:
        raise NotEmulatedError(f"not emulated: {what}")


def need_types(allowed, **tensors):
    for name, tensor in tensors.items():
        need(tensor.dtype in allowed, f"{name} is {' or '.join(map(str, allowed))} (got {tensor.dtype})")


def need_one_type(**tensors):
    """All are of one floating-point type that the device has."""
    need_types(FLOATS, **tensors)
    types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    need(len(set(types.values())) == 1, f"one type for {', '.join(tensors)} (got {types})")
