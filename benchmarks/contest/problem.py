"""Weights, tokens and the float32 reference of one layer. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from contest.shapes import Shape

BIAS = 4.0
"""The first element of every token, which makes the first column of the router's weights a bias."""
MARGIN = {torch.float32: 1e-4, torch.bfloat16: 0.08}
"""In a comparison, how far apart the logits of the last chosen and the first unchosen expert are at least."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02}
"""Largest relative error, in the 2-norm, of the output and of each gradient."""
PARTS = ("output", "tokens", "w_in", "w_out", "router")


@dataclass
class Problem:
    """One layer for all contenders."""

    shape: Shape
    x_TD: Tensor
    """Needs a gradient."""
    grad_TD: Tensor
    """Of the output."""
    w_in: nn.Parameter
    """(E, 2 F, D), the gate's rows first."""
    w_out: nn.Parameter
    """(E, D, F)."""
    router: nn.Parameter
    """(E, D)."""

    @property
    def weights(self) -> list[Tensor]:
        """In the order of PARTS."""
        return [self.w_in, self.w_out, self.router]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.x_TD.device

    @property
    def dtype(self) -> torch.dtype:
        """Of everything."""
        return self.x_TD.dtype


def draw(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Random weights and tokens; products keep the variance of what they are given."""
    random = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=random, device=device, dtype=dtype).mul_(std)

    experts, width, hidden = shape.experts, shape.width, shape.hidden
    x_TD, router = normal(shape.tokens, width), normal(experts, width, std=width**-0.5)
    rank_E = torch.randperm(experts, generator=random, device=device) + 1
    x_TD[:, 0] = BIAS
    router[:, 0] = -shape.zipf * rank_E.log() / BIAS
    return Problem(
        shape,
        x_TD.requires_grad_(),
        normal(shape.tokens, width),
        nn.Parameter(normal(experts, 2 * hidden, width, std=width**-0.5)),
        nn.Parameter(normal(experts, width, hidden, std=hidden**-0.5)),
        nn.Parameter(router),
    )


def redraw(problem: Problem, seed: int) -> None:
    """Give a problem other tokens, as every step of training has: experts get other numbers of rows."""
    random = torch.Generator(device=problem.device).manual_seed(seed)
    with torch.no_grad():
        problem.x_TD[:, 1:].normal_(generator=random)


def draw_decided(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """A problem in which rounding changes no token's choice of experts, for comparisons."""
    drawn = draw(Shape(**shape.as_dict() | {"tokens": 16 * shape.tokens}), device, dtype, seed)
    with torch.no_grad():
        logit_TE = drawn.x_TD.float() @ drawn.router.float().t()
        count = min(shape.top_k + 1, shape.experts)
        top_TK = logit_TE.topk(count, dim=-1).values
        is_clear_T = top_TK[:, shape.top_k - 1] - top_TK[:, -1] > MARGIN[dtype]
        chosen = is_clear_T.nonzero().squeeze(1)[: shape.tokens]
        if count == shape.top_k:
            chosen = torch.arange(shape.tokens, device=device)
        drawn.x_TD, drawn.grad_TD = drawn.x_TD[chosen].clone().requires_grad_(), drawn.grad_TD[chosen].clone()
    drawn.shape = Shape(**shape.as_dict() | {"tokens": len(chosen)})
    return drawn


def reference(problem: Problem) -> list[Tensor]:
    """The output and the gradients of PARTS in float32, one expert after the other.

    Gates are softmax probabilities over all experts, those of the chosen ones divided by their sum.
    """
    leaves = [x.detach().float().requires_grad_() for x in (problem.x_TD, *problem.weights)]
    x_TD, w_in, w_out, router = leaves
    gate_TK, expert_TK = (x_TD @ router.t()).softmax(-1).topk(problem.shape.top_k, dim=-1)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(problem.shape.experts):
        token, choice = (expert_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TD[token] @ w_in[expert].t()).chunk(2, -1)
        out = (nn.functional.silu(gate) * up) @ w_out[expert].t()
        y_TD = y_TD.index_add(0, token, out * gate_TK[token, choice].unsqueeze(1))
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, problem.grad_TD.float())]


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors of PARTS in the 2-norm; NaN where a value is NaN."""
    return {part: float((a.float() - b).norm() / b.norm()) for part, a, b in zip(PARTS, got, want, strict=True)}


def loads(problem: Problem) -> Tensor:
    """Assignments per expert (E,), by float32 logits."""
    with torch.no_grad():
        expert_TK = (problem.x_TD.float() @ problem.router.float().t()).topk(problem.shape.top_k, dim=-1).indices
        return torch.bincount(expert_TK.reshape(-1), minlength=problem.shape.experts)
