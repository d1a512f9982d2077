"""Layers of other projects, each with the problem's weights. One small adapter each; what it needs is in the table.

Written from their published interfaces. An adapter that fails is listed with its error, and nothing else stops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from contest.contender import Contender, Layer, Weights
from contest.problem import Problem

BF16 = (torch.bfloat16,)


def gates(x_TD: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """For libraries that leave routing to their user: normalised gates (T, K) in the type of x, and experts (T, K)."""
    logit_TE = nn.functional.linear(x_TD, problem.router).float()
    gate_TK, expert_TK = logit_TE.softmax(-1).topk(problem.shape.top_k, dim=-1)
    return (gate_TK / gate_TK.sum(-1, keepdim=True)).to(x_TD.dtype), expert_TK


def plain(problem: Problem) -> Layer:
    """What one writes by hand: topk, argsort, index, torch's grouped product."""
    grouped = getattr(nn.functional, "grouped_mm", None) or torch._grouped_mm
    w_in, w_out, k = problem.w_in, problem.w_out, problem.shape.top_k

    def run(x_TD: Tensor) -> Tensor:
        gate_TK, expert_TK = gates(x_TD, problem)
        expert_N = expert_TK.reshape(-1)
        order_R = expert_N.argsort(stable=True)
        ends = torch.bincount(expert_N, minlength=problem.shape.experts).cumsum(0).to(torch.int32)
        gate, up = grouped(x_TD[order_R // k], w_in.transpose(1, 2), offs=ends).chunk(2, -1)
        y_RD = grouped(nn.functional.silu(gate) * up, w_out.transpose(1, 2), offs=ends)
        y_TKD = torch.empty_like(y_RD).index_copy(0, order_R, y_RD).unflatten(0, (-1, k))
        return torch.bmm(gate_TK.unsqueeze(1), y_TKD).squeeze(1)

    return Layer(run, problem.weights)


def transformers_layer(family: str, experts: str) -> Callable[[Problem], Layer]:
    """A block of transformers with one of its implementations of experts."""

    def build(problem: Problem) -> Layer:
        from importlib import import_module

        shape = problem.shape
        class_name = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}[family]
        options: dict[str, Any] = {
            "hidden_size": shape.width,
            "intermediate_size": shape.hidden,
            "num_experts_per_tok": shape.top_k,
            ("num_local_experts" if family == "mixtral" else "num_experts"): shape.experts,
        }
        if family != "mixtral":
            options |= {"norm_topk_prob": True}
        if family == "qwen3_moe":
            options |= {"moe_intermediate_size": shape.hidden}
        folder = f"transformers.models.{family}"
        config = getattr(import_module(f"{folder}.configuration_{family}"), f"{class_name}Config")(**options)
        config._experts_implementation = experts
        block_class = getattr(import_module(f"{folder}.modeling_{family}"), f"{class_name}SparseMoeBlock")
        with torch.device("meta"):
            block = block_class(config)
        block.experts.gate_up_proj, block.experts.down_proj = problem.w_in, problem.w_out
        block.gate.weight = problem.router

        def run(x_TD: Tensor) -> Tensor:
            y = block(x_TD.unsqueeze(0))
            return (y[0] if isinstance(y, tuple) else y).reshape(x_TD.shape)

        return Layer(run, problem.weights)

    return build


def scattermoe(problem: Problem) -> Layer:
    """ScatterMoE's two linear layers; routing as in its examples."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    k = problem.shape.top_k

    def run(x_TD: Tensor) -> Tensor:
        gate_TK, expert_TK = gates(x_TD, problem)
        sorted_expert, sorted_row, ends = flatten_sort_count(expert_TK, num_experts=problem.shape.experts)
        where = (sorted_expert, sorted_row, ends)
        hidden = parallel_linear(x_TD, problem.w_in.permute(0, 2, 1), k, *where, grouped_out=True)
        gate, up = hidden.chunk(2, -1)
        activated = nn.functional.silu(gate) * up
        w_out = problem.w_out.permute(0, 2, 1)
        return parallel_linear(activated, w_out, 1, *where, grouped_in=True, gates=gate_TK)

    return Layer(run, problem.weights)


def liger(problem: Problem) -> Layer:
    """Liger's fused experts; routing by hand."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x_TD: Tensor) -> Tensor:
        gate_TK, expert_TK = gates(x_TD, problem)
        return LigerFusedMoEFunction.apply(x_TD, problem.w_in, problem.w_out, expert_TK.to(torch.int32), gate_TK)

    return Layer(run, problem.weights)


def sonicmoe(problem: Problem) -> Layer:
    """SonicMoE's whole layer, routing included, on the concatenated layout."""
    from sonicmoe import moe_TC_softmax_topk_layer
    from sonicmoe.enums import ActivationType

    w_in, w_out = problem.w_in.permute(1, 2, 0), problem.w_out.permute(1, 2, 0)

    def run(x_TD: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        y_TD, *_ = moe_TC_softmax_topk_layer(
            x_TD,
            problem.router,
            w_in,
            None,
            w_out,
            None,
            problem.shape.top_k,
            stream,
            ActivationType.SWIGLU,
            False,
            concat_layout=True,
        )
        return y_TD

    return Layer(run, problem.weights)


def megablocks(problem: Problem) -> Layer:
    """MegaBlocks' dropless layer with grouped products; its weights are copies, three matrices."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    shape = problem.shape
    experts, width, hidden = shape.experts, shape.width, shape.hidden
    arguments = Arguments(
        hidden_size=width,
        ffn_hidden_size=hidden,
        moe_num_experts=experts,
        moe_top_k=shape.top_k,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=nn.functional.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=problem.device,
        moe_normalize_expert_weights=1,
        moe_loss_weight=0.0,
    )
    layer = dMoE(arguments)
    mlp = layer.experts.mlp
    with torch.no_grad():
        mlp.w1.copy_(problem.w_in[:, :hidden].reshape(-1, width))
        mlp.v1.copy_(problem.w_in[:, hidden:].reshape(-1, width))
        mlp.w2.copy_(problem.w_out.transpose(1, 2).reshape(-1, width))
    layer.router.layer.weight = problem.router

    def run(x_TD: Tensor) -> Tensor:
        y = layer(x_TD.unsqueeze(0))
        return (y[0] if isinstance(y, tuple) else y).reshape(x_TD.shape)

    def common(gradients: Weights) -> Weights:
        gate, up, down, router = gradients
        folded = [x.view(experts, hidden, width) for x in (gate, up, down)]
        return [torch.cat(folded[:2], 1), folded[2].transpose(1, 2), router]

    return Layer(run, [mlp.w1, mlp.v1, mlp.w2, problem.router], common)


def torchtitan(problem: Problem) -> Layer:
    """torchtitan's layer on one device; its weights are copies, three matrices, and its products are in bfloat16."""
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    shape = problem.shape
    experts, width, hidden = shape.experts, shape.width, shape.hidden
    config = moe.MoE.Config(
        num_experts=experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=shape.top_k),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=experts,
            gate=Linear.Config(in_features=width, out_features=experts),
            top_k=shape.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    )
    with torch.device(problem.device):
        layer = config.build()
    inner = layer.routed_experts.inner_experts
    inner.w1_EFD, inner.w3_EFD = (nn.Parameter(w.contiguous()) for w in problem.w_in.detach().chunk(2, 1))
    inner.w2_EDF, layer.router.gate.weight = problem.w_out, problem.router

    def run(x_TD: Tensor) -> Tensor:
        return layer(x_TD.unsqueeze(0)).reshape(x_TD.shape)

    def common(gradients: Weights) -> Weights:
        gate, up, down, router = gradients
        return [torch.cat([gate, up], 1), down, router]

    return Layer(run, [inner.w1_EFD, inner.w3_EFD, problem.w_out, problem.router], common)


class _Expert(nn.Module):
    """One SwiGLU expert, for layers that take experts as modules."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * hidden, width, dtype=dtype, device=device))
        self.w_out = nn.Parameter(torch.empty(width, hidden, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.w_in).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.w_out)


def deepspeed(problem: Problem) -> Layer:
    """DeepSpeed's layer in a group of one process; its experts are modules, and their weights are copies."""
    import os
    import tempfile

    import torch.distributed as dist
    from deepspeed import comm
    from deepspeed.moe.layer import MoE

    shape = problem.shape
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        place = f"file://{tempfile.mkdtemp()}/meeting"
        dist.init_process_group("nccl" if problem.device.type == "cuda" else "gloo", place, rank=0, world_size=1)
        comm.init_distributed(dist_init_required=False)
    expert = _Expert(shape.width, shape.hidden, problem.dtype, problem.device)
    layer = MoE(
        shape.width,
        expert,
        shape.experts,
        k=shape.top_k,
        drop_tokens=False,
        min_capacity=0,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    layer.to(problem.device)
    moe = layer.deepspeed_moe
    experts = list(moe.experts.deepspeed_experts)
    for index, each in enumerate(experts):
        each.w_in.data, each.w_out.data = problem.w_in.data[index], problem.w_out.data[index]
    moe.gate.wg.weight.data = problem.router.data.float()
    parameters = [*(each.w_in for each in experts), *(each.w_out for each in experts), moe.gate.wg.weight]

    def common(gradients: Weights) -> Weights:
        count = shape.experts
        return [torch.stack(list(gradients[:count])), torch.stack(list(gradients[count:-1])), gradients[-1]]

    return Layer(lambda x_TD: layer(x_TD.unsqueeze(0))[0].reshape(x_TD.shape), parameters, common)


def st_moe(problem: Problem) -> Layer:
    """st-moe-pytorch's layer with weights of its own."""
    from st_moe_pytorch import MoE

    shape = problem.shape
    layer = MoE(
        dim=shape.width,
        num_experts=shape.experts,
        gating_top_n=shape.top_k,
        # Its experts have GEGLU blocks of two thirds of what is asked for.
        expert_hidden_mult=1.5 * shape.hidden / shape.width,
    ).to(problem.device, problem.dtype)
    return Layer(lambda x_TD: layer(x_TD.unsqueeze(0))[0].reshape(x_TD.shape), list(layer.parameters()))


PEERS = [
    Contender("plain torch grouped_mm", plain),
    *(
        Contender(f"transformers {label} {experts}", transformers_layer(family, experts), ("transformers",))
        for family, label in (("mixtral", "Mixtral"), ("qwen3_moe", "Qwen3-MoE"), ("olmoe", "OLMoE"))
        for experts in ("eager", "grouped_mm")
    ),
    Contender("SonicMoE", sonicmoe, ("sonicmoe",), ("cuda",), BF16),
    Contender("ScatterMoE", scattermoe, ("scattermoe",), ("cuda",)),
    Contender("Liger", liger, ("liger_kernel",), ("cuda",)),
    Contender("MegaBlocks", megablocks, ("megablocks",), ("cuda",), BF16, copies=True),
    Contender("torchtitan", torchtitan, ("torchtitan",), dtypes=BF16, copies=True),
    Contender("DeepSpeed", deepspeed, ("deepspeed",)),
    Contender(
        "st-moe-pytorch",
        st_moe,
        ("st_moe_pytorch",),
        dtypes=(torch.float32,),
        differs="has GEGLU experts and drops tokens",
    ),
]
"""`plain torch` is no project; it is what one would write without any."""
