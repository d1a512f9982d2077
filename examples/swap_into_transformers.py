"""Put experts into a model of transformers: `moeport.torch.MoE` takes the place of its feed-forward blocks.

A Llama with random weights is made from its config, so nothing is downloaded. `--model` reads one from a folder, with
all its weights but those of the blocks that are replaced. It is trained on bytes for some steps.

    pip install transformers
    python examples/swap_into_transformers.py
    python examples/swap_into_transformers.py --every 2 --router sigmoid_bias
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    import torch
    from torch import Tensor, nn
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

    import moeport.torch
    from moeport.errors import UserError
except ModuleNotFoundError as missing:
    print(f"error: {missing}; install what is needed with: pip install -e '.[torch]' transformers", file=sys.stderr)
    sys.exit(2)

KINDS = ("llama", "qwen2", "qwen3")
"""Models whose feed-forward blocks are `model.model.layers[i].mlp`."""


def swap(model: PreTrainedModel, experts: int, expert_hidden: int, router: str, every: int) -> list[moeport.torch.MoE]:
    """Replace the feed-forward block of every `every`-th layer, the last one among them; returns the new layers."""
    swapped = []
    for number, block in enumerate(model.model.layers, 1):
        if (len(model.model.layers) - number) % every == 0:
            block.mlp = moeport.torch.MoE(
                d_model=model.config.hidden_size, num_experts=experts, expert_hidden=expert_hidden, router=router
            ).to(device=model.device, dtype=model.dtype)
            swapped.append(block.mlp)
    return swapped


def small_llama() -> LlamaForCausalLM:
    """A Llama of three layers that reads bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def train(options: argparse.Namespace) -> list[float]:
    """Train and print; returns the loss of each step, without the auxiliary losses."""
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else small_llama()
    layers = swap(model, options.experts, options.expert_hidden, options.router, options.every)
    print(
        f"{len(layers)} of {len(model.model.layers)} feed-forward blocks are mixtures of {options.experts} experts now"
    )
    text = torch.frombuffer(bytearray(Path(json.__file__).read_bytes() * 4), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    losses = []
    for step in range(1, options.steps + 1):
        ids_BS = batch_of(text)
        output = model(input_ids=ids_BS, labels=ids_BS)
        total = output.loss
        for layer in layers:
            total = total + layer.auxiliary_loss
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for layer in layers:
            layer.update_router_state()
        losses.append(output.loss.item())
        if step % 20 == 0 or step == options.steps:
            loads_E = layers[-1].metrics.chosen_E.tolist()
            print(f"step {step:4}  loss {losses[-1]:.4f}  tokens per expert in the last layer: {loads_E}", flush=True)
    return losses


def batch_of(text: Tensor) -> Tensor:
    """Eight sequences of 128 bytes from random places (B, S)."""
    starts = torch.randint(len(text) - 128, (8,))
    return torch.stack([text[start : start + 128] for start in starts.tolist()])


def size(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small or no integer; expected at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="Swap moeport.torch.MoE into a model of transformers.")
    parser.add_argument("--model", type=Path, help="folder of a Llama, Qwen2 or Qwen3; default: a small new Llama")
    parser.add_argument("--every", type=size, default=1, help="replace every N-th block; default: all")
    parser.add_argument("--experts", type=size, default=8)
    parser.add_argument("--expert-hidden", type=size, default=128)
    parser.add_argument("--router", default="topk", help="a name that `moeport routers` lists")
    parser.add_argument("--steps", type=size, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Train as the command line says; a wrong option is explained, with exit code 2."""
    command = parser()
    options = command.parse_args()
    if not options.learning_rate > 0:
        command.error(f"--learning-rate {options.learning_rate}: expected a number above 0")
    if options.model:
        try:
            kind = json.loads((options.model / "config.json").read_bytes()).get("model_type")
        except (OSError, ValueError) as error:
            command.error(f"--model {options.model}: is not the folder of a model: {error}")
        if kind not in KINDS:
            command.error(f"--model {options.model}: is of the type {kind}; expected one of {', '.join(KINDS)}")
    try:
        train(options)
    except (OSError, UserError) as error:
        command.error(str(error))


if __name__ == "__main__":
    main()
