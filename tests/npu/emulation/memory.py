"""The memory of the device, which is the host's, seen as CPU tensors."""

import ctypes
from collections import Counter

import torch
from torch.utils._pytree import tree_map

calls = Counter()
"""How often each emulated operator has run in this process, by name: `npu::npu_swiglu`, `aten::mm`."""
BACKEND = "PrivateUse1"


def on_host(tensor):
    """The same memory as a CPU tensor."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    shared = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(shared, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_device(tensor, device):
    """A copy in the device's memory."""
    made = torch.empty_like(tensor, device=device)  # keeps the strides where they are dense
    if made.numel():
        on_host(made).copy_(tensor)
    return made


def kernel(name, function):
    """The function of CPU tensors as a kernel of the device.

    It gets its arguments as CPU tensors over the same memory. What it returns is a tensor that it was given, or a new
    one, which is copied to the device.
    """

    def run(*args, **kwargs):
        calls[name] += 1
        given = Arguments()
        result = function(*tree_map(given.on_host, args), **tree_map(given.on_host, kwargs))
        return tree_map(given.on_device, result)

    return run


class Arguments:
    """The arguments of one call: what each is on the host, and on the device."""

    def __init__(self):
        self.pairs, self.device = [], torch.device("npu")

    def on_host(self, x):
        if isinstance(x, torch.device) and x.type == "npu":
            self.device = x
            return torch.device("cpu")
        if not isinstance(x, torch.Tensor) or x.device.type != "npu":
            return x
        self.device = x.device
        self.pairs.append((on_host(x), x))
        return self.pairs[-1][0]

    def on_device(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        for host, device in self.pairs:
            if x is host:
                return device
        return on_device(x, self.device)
