"""PyTorch's operators on the device: for each that torch_npu has a kernel for, the CPU's over the same memory."""

import torch

from tests.npu.emulation.memory import BACKEND, calls, kernel, on_device, on_host

OWN = {
    "_copy_from_and_resize",
    "_pin_memory",
    "as_strided_",
    "empty.memory_format",
    "empty_like",
    "empty_strided",
    "is_pinned",
    "is_set_to",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "resize_as_",
    "set_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
}
"""Those that stay torch_npu's own, besides views: they see to memory and compute nothing."""
TO_HOST = "copies to the host"
"""Under this name `calls` counts them: each waits for the device."""


def install(library):
    for name in torch._C._dispatch_get_registrations_for_dispatch_key(BACKEND):
        namespace, _, operator = name.partition("::")
        if namespace == "aten" and operator not in OWN and (found := _find(operator)) and not _is_view(found):
            library.impl(name, kernel(name, found), BACKEND, allow_override=True)
    for name, (function, key) in BY_HAND.items():
        library.impl(name, _counted(name, function), key, allow_override=True)


def _find(operator):
    """The operator as PyTorch has it, or None: torch_npu also registers names there that PyTorch does not know."""
    name, _, overload = operator.partition(".")
    return getattr(getattr(torch.ops.aten, name, None), overload or "default", None)


def _is_view(operator):
    """Whether it returns a view of an argument, by its schema."""
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _counted(name, function):
    def run(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return run


def _host(x):
    return on_host(x) if x.device.type == "npu" else x


def copy_(to, source, non_blocking=False):
    _host(to).copy_(_host(source))
    calls[TO_HOST] += to.device.type == "cpu"
    return to


def to_copy(
    x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
):  # fmt: skip
    copied = _host(x).to(dtype=dtype or x.dtype, copy=True)
    device = x.device if device is None else device
    calls[TO_HOST] += device.type == "cpu"
    return on_device(copied, device) if device.type == "npu" else copied


def matmul_backward(grad, a, b, mask):
    """Of torch.matmul, whose formula torch_npu has to itself."""
    x, y, dy = on_host(a), on_host(b), on_host(grad)
    if x.dim() == 1:
        x, dy = x.unsqueeze(0), dy.unsqueeze(-1 if y.dim() == 1 else -2)
    if y.dim() == 1:
        y, dy = y.unsqueeze(1), dy.unsqueeze(-1)
    dx = (dy @ y.mT).sum_to_size(x.shape).reshape(a.shape) if mask[0] else None
    dw = (x.mT @ dy).sum_to_size(y.shape).reshape(b.shape) if mask[1] else None
    return tuple(None if d is None else on_device(d, grad.device) for d in (dx, dw))


def one_hot(x, num_classes=-1):
    classes = int(x.max()) + 1 if num_classes == -1 else num_classes
    return torch.zeros(*x.shape, classes, dtype=torch.int64, device=x.device).scatter_(-1, x.unsqueeze(-1), 1)


def scaled_dot_product_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """PyTorch's composition of operators, with its derivative."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the composition adds its mask
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    composed = torch.ops.aten._scaled_dot_product_attention_math
    return composed(q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]


BY_HAND = {
    "aten::copy_": (copy_, BACKEND),
    "aten::_to_copy": (to_copy, BACKEND),
    "aten::matmul_backward": (matmul_backward, BACKEND),
    "aten::one_hot": (one_hot, f"Autograd{BACKEND}"),
    "aten::scaled_dot_product_attention": (scaled_dot_product_attention, f"Autograd{BACKEND}"),
}
"""torch_npu sends the last two past the dispatcher to kernels of CANN, so they are replaced above its autograd."""
