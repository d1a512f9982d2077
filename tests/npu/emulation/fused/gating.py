"""npu_moe_gating_top_k_softmax and npu_moe_gating_top_k: the experts of each token, and their weights."""

import torch

from tests.npu.emulation.fused.rules import emulated, need, need_one_type

SOFTMAX, SIGMOID = 0, 1
LARGEST, SUM_OF_TWO = 0, 1
MOST_CHOICES, MOST_EXPERTS = 1024, 2048


def top_k_softmax(x, finished=None, k=1):
    emulated(finished is None, "finished rows")
    need_one_type(x=x)
    need(x.dim() in (2, 3), f"x has 2 or 3 dims (got {x.dim()})")
    need(0 < k <= min(x.shape[-1], MOST_CHOICES), f"k is 1 to the number of experts (got {k} of {x.shape[-1]})")
    emulated(x.dim() == 2, "3 dims")
    chance = x.float().softmax(-1)
    chosen = _largest(chance, k)
    rows = torch.arange(k * len(x), dtype=torch.int32).view(k, len(x)).t().contiguous()
    return chance.gather(1, chosen).to(x.dtype), chosen.to(torch.int32), rows


def top_k(x, k, *, bias=None, input_ids=None, tid2eid=None, k_group=1, group_count=1, group_select_mode=LARGEST,
          renorm=0, norm_type=SOFTMAX, out_flag=False, routed_scaling_factor=1.0, eps=1e-20):  # fmt: skip
    emulated(input_ids is None and tid2eid is None, "experts by a table")
    need(renorm == 0, f"renorm is 0 (got {renorm})")
    need(norm_type in (SOFTMAX, SIGMOID), f"norm_type is 0 or 1 (got {norm_type})")
    need_one_type(x=x, **({} if bias is None else {"bias": bias}))
    need(x.dim() == 2 and x.shape[1] <= MOST_EXPERTS, f"x has 2 dims and at most {MOST_EXPERTS} columns")
    need(bias is None or bias.shape == x.shape[1:], "a bias for each expert")
    need(group_count > 0 and x.shape[1] % group_count == 0, f"{x.shape[1]} experts in {group_count} equal groups")
    need(x.shape[1] // group_count > 2, "more than 2 experts in a group")
    need(1 <= k_group <= group_count, f"k_group is 1 to group_count (got {k_group})")
    need(1 <= k <= x.shape[1] // group_count * k_group, f"the groups chosen have k experts (got {k})")
    norm = x.float().softmax(-1) if norm_type == SOFTMAX else x.float().sigmoid()
    score = norm if bias is None else norm + bias.float()
    if group_count > 1:
        score = _only_best_groups(score.unflatten(1, (group_count, -1)), k_group, group_select_mode)
    chosen = _largest(score, k)
    weight = norm.gather(1, chosen)
    if norm_type == SIGMOID:
        weight = weight / (weight.sum(-1, keepdim=True) + eps)
    # What the device leaves there when it was not asked for is unknown; torch_npu's derivative reads it.
    kept = norm if out_flag else torch.full_like(norm, torch.nan)
    return (weight * routed_scaling_factor).to(x.dtype), chosen.to(torch.int32), kept


def top_k_backward(x_norm, grad_y, chosen, *, renorm=0, norm_type=SOFTMAX, routed_scaling_factor=1.0, eps=1e-20):
    index, d_weight = chosen.long(), grad_y.float() * routed_scaling_factor
    if norm_type == SIGMOID:
        value = x_norm.gather(1, index)
        total = value.sum(-1, keepdim=True) + eps
        d_weight = (d_weight - (d_weight * value).sum(-1, keepdim=True) / total) / total
    d_norm = torch.zeros_like(x_norm).scatter_(1, index, d_weight)
    if norm_type == SIGMOID:
        return (d_norm * x_norm * (1 - x_norm)).to(grad_y.dtype)
    return (x_norm * (d_norm - (d_norm * x_norm).sum(-1, keepdim=True))).to(grad_y.dtype)


def _largest(x, k):
    """Indices of the k largest, the first of equal ones."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]


def _only_best_groups(score_TGE, k_group, mode):
    best_TG = score_TGE.amax(-1) if mode == LARGEST else score_TGE.topk(2).values.sum(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, _largest(best_TG, k_group), True)
    return score_TGE.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)


OPERATORS = {
    "npu_moe_gating_top_k_softmax": top_k_softmax,
    "npu_moe_gating_top_k": top_k,
    "npu_moe_gating_top_k_backward": top_k_backward,
}
