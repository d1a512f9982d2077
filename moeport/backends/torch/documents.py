"""Attention that does not cross documents: what the layers of a pass share. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moeport.backends.torch.private import inside_torch_func, version_of
from moeport.core.ops import AttentionOptions

T = TypeVar("T")

_made: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By documents of a batch: their version, and what was made of them by name. It ends with the batch."""


def once_per_pass(document_BS: Tensor, name: tuple[object, ...], make: Callable[[], T]) -> T:
    """What is made of the documents of a batch: the first layer makes it, the others find it.

    It must not refer to `document_BS` itself, which would then never be freed. Made anew in each call where a tensor
    has no memory of its own or no version, and while a graph is traced or recorded.
    """
    if not _is_plain(document_BS):
        return make()
    version, made = _made.get(document_BS, (None, {}))
    if version != version_of(document_BS):
        version, made = _made[document_BS] = version_of(document_BS), {}
    if name not in made:
        made[name] = make()
    found: T = made[name]
    return found


def _is_plain(x: Tensor) -> bool:
    if type(x) is not Tensor or torch.compiler.is_compiling() or x.is_inference():
        return False
    if inside_torch_func():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def hidden_pairs(document_BS: Tensor, causal: bool) -> Tensor:
    """Which keys each query does not see, (B, 1, S, S): those of other documents and, if causal, later ones."""

    def make() -> Tensor:
        others_BSS = document_BS.unsqueeze(2) != document_BS.unsqueeze(1)
        if causal:
            length = document_BS.shape[1]
            others_BSS = others_BSS | torch.ones(length, length, dtype=torch.bool, device=document_BS.device).triu(1)
        return others_BSS.unsqueeze(1)

    return once_per_pass(document_BS, ("hidden", causal), make)


def masked_attention(q_BSHA: Tensor, k_BSGA: Tensor, v_BSGW: Tensor, options: AttentionOptions) -> Tensor:
    """PyTorch's attention with a term of minus infinity for the pairs that are hidden.

    The term is made in the type of q, since PyTorch would make one of truth values again in each layer. On CUDA no
    kernel takes both a term and grouped heads, so each key and value is repeated for its query heads there.
    """
    document_BS, causal = options.document_BS, options.causal

    def make() -> Tensor:
        hidden_B1SS = hidden_pairs(document_BS, causal)
        return torch.zeros_like(hidden_B1SS, dtype=q_BSHA.dtype).masked_fill_(hidden_B1SS, -torch.inf)

    term_B1SS = once_per_pass(document_BS, ("term", causal, q_BSHA.dtype), make)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHA, k_BSGA, v_BSGW))
    grouped, repeats = q.shape[1] != k.shape[1], q.shape[1] // k.shape[1]
    if grouped and q.is_cuda:
        k, v, grouped = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=term_B1SS, scale=options.scale, enable_gqa=grouped)
    return out.transpose(1, 2)
