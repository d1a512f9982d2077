"""Operations with a fault, for the table of planted faults; each replaces a method of `TorchOps`.

`self.calls(name)` counts the calls of a kind, so a fault can be in one block only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import CAUSAL

# ---------------------------------------------------------------------- norms


def no_eps(self, x, weight, eps):
    return TorchOps.rms_norm(self, x, weight, 0.0)


def large_eps(self, x, weight, eps):
    return TorchOps.rms_norm(self, x, weight, 1e-3)


def no_norm(self, x, weight, eps):
    """The second norm of the second block."""
    return x * weight.to(x.dtype) if _in_second_block(self, x) else TorchOps.rms_norm(self, x, weight, eps)


def over_positions(self, x, weight, eps):
    if not _in_second_block(self, x):
        return TorchOps.rms_norm(self, x, weight, eps)
    return (x.float() / (x.float().square().mean(-2, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


def without_weight(self, x, weight, eps):
    return TorchOps.rms_norm(self, x, torch.ones_like(weight) if _in_second_block(self, x) else weight, eps)


def minus_mean(self, x, weight, eps):
    x = x - x.mean(-1, keepdim=True) if _in_second_block(self, x) else x
    return TorchOps.rms_norm(self, x, weight, eps)


def _in_second_block(self, x):
    """True in the fourth of the five norms of width 32 of a pass."""
    return x.shape[-1] == 32 and self.calls("norm") % 5 == 3


# ---------------------------------------------------------------------- positions and masks


def one_position_late(self, x, cos, sin):
    cos, sin = (torch.cat((table[:1], table[:-1])) for table in (cos, sin))
    return TorchOps.rope(self, x, cos, sin)


def interleaved(self, x, cos, sin):
    """Pairs (2 i, 2 i + 1) in place of (i, i + A / 2)."""
    half = x.shape[-1] // 2
    order = torch.arange(2 * half).reshape(half, 2).T.reshape(-1)
    return TorchOps.rope(self, x[..., order], cos, sin)[..., order.argsort()]


def other_direction(self, x, cos, sin):
    return TorchOps.rope(self, x, cos, -sin)


def keys_not_rotated(self, x, cos, sin):
    return x if x.shape[2] == 1 else TorchOps.rope(self, x, cos, sin)


def masked_attention(allowed):
    """Attention with another mask: `allowed(query, key)` on positions."""

    def attention(self, q, k, v, options=CAUSAL):
        position = torch.arange(q.shape[1])
        mask = allowed(position[:, None], position[None, :])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return attention


def unscaled_attention(self, q, k, v, options=CAUSAL):
    return TorchOps.attention(self, q * q.shape[-1] ** 0.5, k, v, options)


# ---------------------------------------------------------------------- routing


def third_in_place_of_second(self, x, k):
    best = TorchOps.topk_ids(self, x, k + 1)
    return torch.cat((best[..., : k - 1], best[..., k:]), -1)


def smallest(self, x, k):
    return TorchOps.topk_ids(self, -x, k)


def gates_of_the_wrong_choice(self, x, ids):
    out = TorchOps.take_last(self, x, ids)
    return out.flip(-1) if ids.shape[-1] == 2 else out


def softmax_in_bfloat16(self, x):
    return x.bfloat16().softmax(-1).to(x.dtype)


def router_in_bfloat16(self, x, weight):
    if weight.shape[0] != 4:
        return TorchOps.linear(self, x, weight)
    return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)


def bfloat16_sums(self, x, weight):
    """Half of the products are added up in bfloat16."""
    if weight.shape != (32, 32):
        return TorchOps.linear(self, x, weight)
    weight = weight.to(x.dtype)
    halves = [F.linear(x[..., i::8], weight[:, i::8]).bfloat16() for i in range(8)]
    out = halves[0]
    for half in halves[1:]:
        out = (out + half).bfloat16()
    return out.to(x.dtype)


# ---------------------------------------------------------------------- dispatch


def rows_swapped(self, x_TD, plan):
    rows = TorchOps.permute(self, x_TD, plan)
    order = torch.arange(len(rows))
    order[[0, -1]] = order[[-1, 0]]
    return rows[order]


def gates_forgotten(self, y_RD, weight_N, plan):
    return TorchOps.unpermute(self, y_RD, torch.ones_like(weight_N), plan)


def gate_of_another_assignment(self, y_RD, weight_N, plan):
    return TorchOps.unpermute(self, y_RD, weight_N.roll(1), plan)


def rows_of_another_token(self, x_TD, plan):
    return TorchOps.permute(self, x_TD.roll(1, 0), plan)


def one_row_to_the_next_expert(self, x_RD, w_in, w_out_EDF, counts_E, activation):
    counts = counts_E.clone()
    given = int(counts.argmax())
    counts[given] -= 1
    counts[(given + 1) % 4] += 1
    return TorchOps.grouped_mlp(self, x_RD, w_in, w_out_EDF, counts, activation)


def gate_and_up_exchanged(self, x_RD, w_in, w_out_EDF, counts_E, activation):
    return TorchOps.grouped_mlp(self, x_RD, w_in.roll(w_in.shape[1] // 2, 1), w_out_EDF, counts_E, activation)


# ---------------------------------------------------------------------- the loss


def with_targets(change):
    """The loss of other targets."""

    def loss(self, x, weight, target, z_weight):
        return TorchOps.linear_cross_entropy(self, x, weight, change(target), z_weight)

    return loss


def logits_in_bfloat16(self, x, weight, target, z_weight):
    logits = F.linear(x.bfloat16(), weight.bfloat16()).float()
    z = logits.logsumexp(-1).square().mean()
    nll = F.cross_entropy(logits, target)
    return nll + z_weight * z, nll.detach(), z.detach()


def no_output_z_loss(self, x, weight, target, z_weight):
    return TorchOps.linear_cross_entropy(self, x, weight, target, 0.0)


def sum_in_place_of_mean(self, x, weight, target, z_weight):
    loss, nll, z = TorchOps.linear_cross_entropy(self, x, weight, target, z_weight)
    return loss * len(target), nll, z


def nan_values(self, x, weight):
    """The values of the first block: every pass has ten products, q, k, v, out and the router of both blocks."""
    out = TorchOps.linear(self, x, weight)
    return out * float("nan") if self.calls("values") % 10 == 2 else out


def nan_from(name, call):
    """An operation whose result is NaN from its n-th call on, counted from 0."""

    def method(self, *args):
        out = getattr(TorchOps, name)(self, *args)
        if self.calls(f"nan {name}") < call:
            return out
        return (out[0] * float("nan"), *out[1:]) if isinstance(out, tuple) else out * float("nan")

    return {name: method}
