"""A plain PyTorch mixture-of-experts language model: the baseline of the abstraction-tax benchmark.

Everything is in this one file, written the way one would by hand for one device: no registry, no
configuration system, no import from moeport. Parameters are fp32 and matrix products run in
``compute_dtype`` (fp32 or bf16); norms, router, softmax and loss are computed in fp32. Dispatch is
dropless: token copies are sorted by expert (stable) and every expert multiplies one contiguous slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainConfig:
    """Sizes and options of a :class:`PlainMoELM`."""

    vocab_size: int = 4096
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 64
    qk_norm: bool = True
    d_ff: int = 512  # hidden size of a dense layer's MLP
    n_experts: int = 8
    top_k: int = 2
    expert_d_ff: int = 256
    shared_d_ff: int = 0  # hidden size of the shared expert, 0 for none
    normalize_gates: bool = True
    first_moe_layer: int = 0  # the layers before this one are dense
    moe_every: int = 1  # from there on, every n-th layer is MoE
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    tied: bool = True
    aux_coef: float = 0.01
    z_coef: float = 0.001
    loss_chunk: int = 256  # rows of logits that exist at a time
    compute_dtype: torch.dtype = torch.float32

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` routes its tokens."""
        return layer >= self.first_moe_layer and (layer - self.first_moe_layer) % self.moe_every == 0


class LMOutput(NamedTuple):
    """What :meth:`PlainMoELM.forward` returns; ``loss`` is the sum that training minimises."""

    loss: Tensor
    ce: Tensor
    aux: Tensor
    z: Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in the type of ``x``."""
    return F.linear(x, weight.to(x.dtype))


class _RMSNormFn(torch.autograd.Function):
    """RMSNorm over the last dimension, fp32 inside, in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        xf = x.float()
        rstd = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).square_()
        rstd = rstd.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (xf * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        x_hat = x.float() * rstd
        dyf = dy.float()
        prod = dyf * x_hat
        d_weight = prod.flatten(0, -2).sum(0)
        mean = (prod.flatten(0, -2) @ weight).div_(x.shape[-1]).view_as(rstd)
        dx = (dyf * weight).sub_(x_hat.mul_(mean)).mul_(rstd)
        return dx.to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``x``, in the type of ``x``."""
        out: Tensor = _RMSNormFn.apply(x, self.weight, self.eps)
        return out


def rope_tables(length: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine, each [length, dim], for :func:`apply_rope`."""
    inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv_freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of ``x`` [B, S, H, head_dim]."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos[:, None], x.roll(half, -1), sin[:, None])


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE and optional per-head RMSNorm of queries and keys."""

    def __init__(self, cfg: PlainConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.qkv = nn.Parameter(torch.empty((cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim, cfg.d_model))
        self.out = nn.Parameter(torch.empty(cfg.d_model, cfg.n_heads * cfg.head_dim))
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention output for ``x`` [B, S, D]."""
        b, s, _ = x.shape
        qkv = linear(x, self.qkv).view(b, s, -1, self.head_dim)
        q, k, v = qkv.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        return linear(y.transpose(1, 2).reshape(b, s, -1), self.out)


class _SwiGLUExperts(torch.autograd.Function):
    """SwiGLU MLPs of all experts over rows sorted by expert, every product on a contiguous slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        hidden = x.new_empty(x.shape[0], gate_up.shape[1])
        for xe, he, w in zip(x.split(counts), hidden.split(counts), gate_up, strict=True):
            torch.mm(xe, w.t(), out=he)
        gate, up = hidden.chunk(2, -1)
        act = F.silu(gate).mul_(up)
        y = torch.empty_like(x)
        for ae, ye, w in zip(act.split(counts), y.split(counts), down, strict=True):
            torch.mm(ae, w.t(), out=ye)
        ctx.save_for_backward(x, gate_up, down, hidden, act)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate_up, down, hidden, act = ctx.saved_tensors
        counts = ctx.counts
        dy = dy.contiguous()
        d_act, d_down = torch.empty_like(act), torch.empty_like(down)
        for e, (ae, dye, dae) in enumerate(zip(act.split(counts), dy.split(counts), d_act.split(counts), strict=True)):
            torch.mm(dye, down[e], out=dae)
            torch.mm(dye.t(), ae, out=d_down[e])
        gate, up = hidden.chunk(2, -1)
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, -1)
        torch.mul(d_act, F.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_act.mul_(up), gate))
        dx, d_gate_up = torch.empty_like(x), torch.empty_like(gate_up)
        for e, (xe, dhe, dxe) in enumerate(zip(x.split(counts), d_hidden.split(counts), dx.split(counts), strict=True)):
            torch.mm(dhe, gate_up[e], out=dxe)
            torch.mm(dhe.t(), xe, out=d_gate_up[e])
        return dx, d_gate_up, d_down, None


class SwiGLU(nn.Module):
    """Dense SwiGLU MLP; also the shared expert."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_ff))

    def forward(self, x: Tensor) -> Tensor:
        """MLP output for ``x`` [..., D]."""
        gate, up = linear(x, self.gate_up).chunk(2, -1)
        return linear(F.silu(gate) * up, self.down)


class MoE(nn.Module):
    """Top-k routed SwiGLU experts, dropless, with an optional shared expert."""

    def __init__(self, cfg: PlainConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k, self.normalize_gates = cfg.n_experts, cfg.top_k, cfg.normalize_gates
        self.router = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model))
        self.gate_up = nn.Parameter(torch.empty(cfg.n_experts, 2 * cfg.expert_d_ff, cfg.d_model))
        self.down = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model, cfg.expert_d_ff))
        self.shared = SwiGLU(cfg.d_model, cfg.shared_d_ff) if cfg.shared_d_ff else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, load-balancing loss and router z-loss (both without their coefficients)."""
        flat = x.flatten(0, 1)
        n, d = flat.shape
        logits = F.linear(flat.float(), self.router)
        z = torch.logsumexp(logits, -1).square().mean()
        probs = logits.softmax(-1)
        gates, experts = probs.topk(self.top_k, dim=-1)
        if self.normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)
        chosen = experts.flatten()
        counts = torch.bincount(chosen, minlength=self.n_experts)
        aux = self.n_experts * torch.dot(counts / chosen.numel(), probs.mean(0))

        order = chosen.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        rows = flat.index_select(0, order.div(self.top_k, rounding_mode="floor"))
        y = _SwiGLUExperts.apply(rows, self.gate_up.to(x.dtype), self.down.to(x.dtype), counts.tolist())
        y = y.index_select(0, inverse).view(n, self.top_k, d) * gates.to(x.dtype).unsqueeze(-1)
        out = y.sum(1).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, aux, z


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: PlainConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp: MoE | SwiGLU = MoE(cfg) if cfg.is_moe(layer) else SwiGLU(cfg.d_model, cfg.d_ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """New residual stream and, from an MoE layer, its load-balancing loss and z-loss."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        h = self.mlp_norm(x)
        if isinstance(self.mlp, MoE):
            y, aux, z = self.mlp(h)
            return x + y, aux, z
        return x + self.mlp(h), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``h @ weight.T``, gradients taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        w = weight.to(h.dtype)
        n = h.shape[0]
        total = h.new_zeros((), dtype=torch.float32)
        dh = torch.empty_like(h)
        dw = torch.zeros_like(weight)
        for hc, tc, dhc in zip(h.split(chunk), targets.split(chunk), dh.split(chunk), strict=True):
            logits = torch.mm(hc, w.t()).float()
            logp = F.log_softmax(logits, -1)
            total += F.nll_loss(logp, tc, reduction="sum")
            if not any(ctx.needs_input_grad):
                continue
            dlogits = logp.exp_()
            dlogits[torch.arange(tc.shape[0], device=tc.device), tc] -= 1.0
            dl = dlogits.to(h.dtype)
            torch.mm(dl, w, out=dhc)
            dw += torch.mm(dl.t(), hc)
        ctx.save_for_backward(dh.div_(n), dw.div_(n))
        return total / n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dh, dw = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dw * grad, None, None


class PlainMoELM(nn.Module):
    """Decoder-only mixture-of-experts language model."""

    def __init__(self, cfg: PlainConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))
        self.lm_head = self.embed if cfg.tied else nn.Parameter(torch.empty_like(self.embed))
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal initialisation; projections into the residual stream are scaled by 1/sqrt(2 layers)."""
        std = self.cfg.init_std
        residual_std = std / math.sqrt(2 * self.cfg.n_layers)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=residual_std if name.endswith((".out", ".down")) else std)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states [B, S, D] of ``tokens`` [B, S], and the mean router losses over MoE layers."""
        cfg = self.cfg
        cos, sin = rope_tables(tokens.shape[1], cfg.head_dim, cfg.rope_base, cfg.compute_dtype, tokens.device)
        x = F.embedding(tokens, self.embed).to(cfg.compute_dtype)
        aux_losses, z_losses = [x.new_zeros((), dtype=torch.float32)], [x.new_zeros((), dtype=torch.float32)]
        for block in self.blocks:
            x, aux, z = block(x, cos, sin)
            if aux is not None:
                aux_losses.append(aux)
                z_losses.append(z)
        n_moe = max(len(aux_losses) - 1, 1)
        return self.norm(x), torch.stack(aux_losses).sum() / n_moe, torch.stack(z_losses).sum() / n_moe

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [B, S, V] in fp32."""
        return linear(self.hidden(tokens)[0], self.lm_head).float()

    def forward(self, tokens: Tensor, targets: Tensor) -> LMOutput:
        """Training loss of predicting ``targets`` [B, S] from ``tokens`` [B, S]."""
        h, aux, z = self.hidden(tokens)
        ce = _LinearCrossEntropy.apply(h.flatten(0, 1), self.lm_head, targets.flatten(), self.cfg.loss_chunk)
        return LMOutput(ce + self.cfg.aux_coef * aux + self.cfg.z_coef * z, ce, aux, z)
