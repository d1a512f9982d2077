"""A small transformer in plain PyTorch whose feed-forward blocks are `moeport.torch.MoE`, and its training loop.

It reads bytes, by default the sources of Python's own standard library. Four places differ from the same model without
experts, which `--dense` trains; each is marked `MoE`.

    python examples/pytorch_model.py
    python examples/pytorch_model.py --router sigmoid_bias --capacity-factor 1.25
    python examples/pytorch_model.py --amp --compile
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    import moeport.torch
    from moeport.errors import UserError
except ModuleNotFoundError as missing:
    print(f"error: {missing}; install what is needed with: pip install -e '.[torch]'", file=sys.stderr)
    sys.exit(2)

BYTES = 256


class Attention(nn.Module):
    """Causal attention with several heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Each token looks at itself and at those before it."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a feed-forward block."""

    def __init__(self, width: int, heads: int, ffn: nn.Module):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.ffn = ffn

    def forward(self, x_BSD: Tensor) -> Tensor:
        """The input with what both add to it."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class Model(nn.Module):
    """A language model of bytes."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        width = options.width
        self.embedding = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(options.length, width)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, options.heads, feed_forward(options)) for _ in range(options.blocks))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of the next byte."""
        x_BSD = self.embedding(ids_BS) + self.positions(torch.arange(ids_BS.shape[1], device=ids_BS.device))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


def feed_forward(options: argparse.Namespace) -> nn.Module:
    """The block that experts take the place of; a dense one has the width that a token's two experts have together."""
    if options.dense:
        hidden = 2 * options.expert_hidden
        return nn.Sequential(nn.Linear(options.width, hidden), nn.SiLU(), nn.Linear(hidden, options.width))
    capacity = {"policy": "factor", "factor": options.capacity_factor} if options.capacity_factor else None
    return moeport.torch.MoE(  # MoE 1: the layer
        d_model=options.width,
        num_experts=options.experts,
        expert_hidden=options.expert_hidden,
        router=options.router,
        capacity=capacity,
        init_std=options.width**-0.5,
    )


def moe_layers(model: nn.Module) -> list[moeport.torch.MoE]:
    """All layers with experts, from the bottom to the top."""
    return [module for module in model.modules() if isinstance(module, moeport.torch.MoE)]


def loads(layers: list[moeport.torch.MoE]) -> dict[str, float]:
    """Of the last call: the share of dropped choices, and the largest load of an expert over the mean load."""
    chosen_LE = torch.stack([layer.metrics.chosen_E for layer in layers]).double()
    served_LE = torch.stack([layer.metrics.served_E for layer in layers]).double()
    return {
        "dropped": float(1 - served_LE.sum() / chosen_LE.sum()),
        "imbalance": float((chosen_LE.amax(1) / chosen_LE.mean(1)).mean()),
    }


def read_bytes(paths: list[Path]) -> Tensor:
    """The bytes of all files one after another, as a tensor of integers."""
    text = b"".join(path.read_bytes() for path in paths)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch_of(text: Tensor, options: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes at random places (B, S), and the byte that follows each of them (B, S)."""
    starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator)
    rows = torch.stack([text[start : start + options.length + 1] for start in starts.tolist()]).long()
    rows = rows.to(options.device)
    return rows[:, :-1], rows[:, 1:]


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Train and print; returns what was printed: the mean loss since the last line, and the loads of the last step."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    text = read_bytes(options.text)
    model = Model(options).to(options.device)
    layers = moe_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
    amp = torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.amp)
    step_of = model
    if options.compile:
        with torch.no_grad(), amp:
            model(batch_of(text, options, generator)[0][:1])  # fused operators are tried in the first call
        step_of = torch.compile(model)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text, on {options.device}"
    )
    printed: list[dict[str, float]] = []
    losses: list[Tensor] = []
    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        ids_BS, next_BS = batch_of(text, options, generator)
        with amp:
            logits_BSV = step_of(ids_BS)
            loss = functional.cross_entropy(logits_BSV.flatten(0, 1).float(), next_BS.flatten())
        total = loss
        for layer in layers:
            total = total + layer.auxiliary_loss  # MoE 2: the losses that balance the experts
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for layer in layers:
            layer.update_router_state()  # MoE 3: what routers such as sigmoid_bias learn without a gradient
        losses.append(loss.detach())
        if step % options.print_interval == 0 or step == options.steps:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            found = {"step": step, "loss": mean, **(loads(layers) if layers else {})}  # MoE 4: its metrics
            printed.append(found)
            extra = f"  dropped {found['dropped']:6.1%}  imbalance {found['imbalance']:.2f}" if layers else ""
            print(f"step {step:5}  loss {found['loss']:.4f}{extra}  {time.perf_counter() - began:6.1f} s", flush=True)
    return printed


def size(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small or no integer; expected at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options, with defaults that take a minute on an idle CPU core."""
    parser = argparse.ArgumentParser(description="Train a small transformer with moeport.torch.MoE.")
    add = parser.add_argument
    add("--dense", action="store_true", help="no experts: the same model with dense blocks of equal cost per token")
    add("--router", default="topk", help="a name that `moeport routers` lists; default topk")
    add("--capacity-factor", type=float, help="drop what exceeds this multiple of an even load; default: drop nothing")
    add("--experts", type=size, default=8)
    add("--expert-hidden", type=size, default=128)
    add("--blocks", type=size, default=3)
    add("--width", type=size, default=128)
    add("--heads", type=size, default=4)
    add("--length", type=size, default=128, help="bytes per sequence")
    add("--batch", type=size, default=16, help="sequences per step")
    add("--steps", type=size, default=300)
    add("--print-interval", type=size, default=50)
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="compute in bfloat16 under torch.autocast")
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler on a CPU")
    add("--text", type=Path, nargs="+", default=sorted(Path(json.__file__).parents[1].glob("*.py")), metavar="FILE")
    return parser


def main() -> None:
    """Train as the command line says; a wrong option is explained, with exit code 2."""
    command = parser()
    options = command.parse_args()
    if options.width % options.heads:
        command.error(f"--heads {options.heads}: does not divide --width {options.width}")
    if not options.learning_rate > 0:
        command.error(f"--learning-rate {options.learning_rate}: expected a number above 0")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        command.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    try:
        if sum(path.stat().st_size for path in options.text) <= options.length:
            command.error(f"--text: too short; expected more than the {options.length} bytes of --length")
        train(options)
    except (OSError, UserError) as error:
        command.error(str(error))


if __name__ == "__main__":
    main()
