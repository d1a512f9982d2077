"""npu_moe_token_permute, which sorts copies of tokens by expert, and npu_moe_token_unpermute, which sums them again."""

import torch

from tests.npu.emulation.fused.rules import FLOATS, emulated, need, need_one_type, need_types

MOST_CHOICES = 512
INDEX_LIMIT = 16_777_215
"""Indices, and their number, are below it."""


def permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    emulated(not padded_mode, "padded_mode")
    need_one_type(tokens=tokens)
    need_types((torch.int32, torch.int64), indices=indices)
    need(tokens.dim() == 2, f"tokens have 2 dims (got {tokens.dim()})")
    need(indices.dim() in (1, 2), f"indices have 1 or 2 dims (got {indices.dim()})")
    need(indices.shape[0] == tokens.shape[0], f"a row of indices for each token (got {indices.shape[0]})")
    choices = indices.shape[1] if indices.dim() == 2 else 1
    need(choices <= MOST_CHOICES, f"at most {MOST_CHOICES} indices for a token")
    need(indices.numel() < INDEX_LIMIT, f"fewer than {INDEX_LIMIT} indices")
    need(((indices >= 0) & (indices < INDEX_LIMIT)).all(), f"indices are 0 or more and below {INDEX_LIMIT}")
    order = torch.argsort(indices.flatten(), stable=True)
    inverse = torch.argsort(order)
    kept = order[: num_out_tokens or None]
    return tokens.index_select(0, kept // choices), inverse.to(torch.int32)


def permute_backward(grad, sorted_indices, tokens, dtype, choices, padded_mode=False):
    dropped = grad.new_zeros(tokens * choices - len(grad), grad.shape[1])  # their places are behind the last row
    rows = torch.cat([grad, dropped]).float().index_select(0, sorted_indices.long())
    return rows.view(tokens, choices, -1).sum(1).to(dtype)


def unpermute(permuted, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    emulated(not padded_mode and restore_shape is None, "padded_mode")
    need_one_type(permuted_tokens=permuted)
    need_types((torch.int32,), sorted_indices=sorted_indices)
    need(permuted.dim() == 2 and sorted_indices.dim() == 1, "permuted_tokens have 2 dims and sorted_indices 1")
    need(len(permuted) == len(sorted_indices), f"a row for each of the sorted_indices (got {len(permuted)})")
    places = torch.arange(len(permuted), dtype=torch.int32)
    need(torch.equal(sorted_indices.sort().values, places), "sorted_indices name every row once")
    rows = permuted.float().index_select(0, sorted_indices.long())
    if probs is None:
        return rows.to(permuted.dtype)
    need_types(FLOATS, probs=probs)
    need(probs.dim() == 2 and probs.numel() == sorted_indices.numel(), "a probability for each of the sorted_indices")
    need(probs.shape[1] <= MOST_CHOICES, f"at most {MOST_CHOICES} probabilities for a token")
    return (rows.view(*probs.shape, -1) * probs.float().unsqueeze(-1)).sum(1).to(permuted.dtype)


def unpermute_for_autograd(permuted, *args, **kwargs):
    return unpermute(permuted, *args, **kwargs), permuted.clone()


def unpermute_backward(
    grad, sorted_indices, rows, dtype, probs=None, padded_mode=False, restore_shape=None, permuted_tokens=None
):
    dy = grad.float()
    spread = dy if probs is None else (dy.unsqueeze(1) * probs.float().unsqueeze(-1)).flatten(0, 1)
    d_permuted = torch.empty(rows, dy.shape[1]).index_copy_(0, sorted_indices.long(), spread).to(dtype)
    if probs is None:
        return d_permuted, None
    tokens = permuted_tokens.float().index_select(0, sorted_indices.long()).view(*probs.shape, -1)
    return d_permuted, (tokens * dy.unsqueeze(1)).sum(-1).to(probs.dtype)


OPERATORS = {
    "npu_moe_token_permute": permute,
    "npu_moe_token_permute_grad_v2": permute_backward,
    "npu_moe_token_unpermute": unpermute,
    "_npu_moe_token_unpermute": unpermute_for_autograd,
    "npu_moe_token_unpermute_grad_v2": unpermute_backward,
}
