"""What the neutral core costs: a training step of moeport against a plain hand-written PyTorch model.

Both have the shapes of the config (the quickstart unless another is given), the same weights and the same batches, and
do the same work a step: forward, backward,
clipping by the global norm, AdamW. Steps are interleaved, so that a noisy machine disturbs both alike; the ratio of
medians is what counts. The losses of the two are compared first: they must be the same computation.

    python benchmarks/abstraction_tax.py [CONFIG] [--rounds 60] [--set key=value ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from plain_model import PlainConfig, PlainMoELM

from moeport.backends.base import TrainingOptions
from moeport.backends.torch.backend import TorchBackend
from moeport.config import load_config
from moeport.config.schema import Config
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM

TARGET = 1.05


def plain_twin(config: Config, vocab_size: int, params: dict[str, np.ndarray], dtype: torch.dtype) -> PlainMoELM:
    """The hand-written model of the same shapes with the same weights."""
    model, moe = config.model, config.model.moe
    coefficient = moe.load_balance.coefficient
    plain = PlainMoELM(
        PlainConfig(
            vocab_size=vocab_size,
            d_model=model.d_model,
            n_layers=model.num_layers,
            n_heads=model.num_heads,
            n_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            qk_norm=bool(model.attention.qk_norm),
            d_ff=model.dense_width,
            n_experts=moe.num_experts,
            top_k=moe.router.experts_per_token,
            expert_d_ff=moe.expert_hidden,
            shared_d_ff=moe.num_shared_experts * moe.expert_hidden,
            normalize_gates=getattr(moe.router, "normalize_gates", False),
            first_moe_layer=model.moe_layers[0],
            moe_every=moe.every,
            rope_base=model.attention.rope_base,
            norm_eps=model.norm_eps,
            tied=model.tie_embeddings,
            aux_coef=(0.01 if coefficient is None else coefficient) * len(model.moe_layers),
            z_coef=moe.router_z_loss * len(model.moe_layers),
            compute_dtype=dtype,
        )
    )
    state = {"embed": params["embedding.weight"], "norm.weight": params["final_norm.weight"]}
    if not model.tie_embeddings:
        state["lm_head"] = params["lm_head.weight"]
    for layer in range(model.num_layers):
        ours = {name.removeprefix(f"layers.{layer}."): value for name, value in params.items()}
        block = {
            "attn_norm.weight": ours["attention_norm.weight"],
            "mlp_norm.weight": ours["mlp_norm.weight"],
            "attn.qkv": np.concatenate([ours[f"attention.{name}"] for name in "qkv"]),
            "attn.out": ours["attention.out"],
        }
        if model.attention.qk_norm:
            block |= {f"attn.{name}.weight": ours[f"attention.{name}"] for name in ("q_norm", "k_norm")}
        if model.is_moe_layer(layer):
            block |= {
                "mlp.router": ours["moe.router.weight"],
                "mlp.gate_up": ours["moe.experts.w_in"],
                "mlp.down": ours["moe.experts.w_out"],
            }
            if moe.num_shared_experts:
                block |= {"mlp.shared.gate_up": ours["moe.shared.w_in"], "mlp.shared.down": ours["moe.shared.w_out"]}
        else:
            block |= {"mlp.gate_up": ours["mlp.w_in"], "mlp.down": ours["mlp.w_out"]}
        state |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    missing = plain.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head"}
    return plain


def plain_step(plain: PlainMoELM, config: Config) -> Callable[[Batch, float], torch.Tensor]:
    """One training step of the hand-written model, which returns its loss on the device."""
    settings = config.optimizer
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)

    device = plain.embed.device

    def step(batch: Batch, lr: float) -> torch.Tensor:
        out = plain(*(torch.from_numpy(ids).to(device) for ids in (batch.token_BS, batch.target_BS)))
        out.loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss.detach()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()

    config = load_config(arguments.config, [*arguments.overrides, "backend.device=cpu"])
    backend = TorchBackend(config.backend)
    vocab_size = config.model.vocab_size or int(getattr(config.data.tokenizer, "vocab_size", 257))
    lm = DecoderLM(config.model, vocab_size)
    params = initial_parameters(lm.parameter_specs(), config.training.seed)
    ours = backend.training_model(lm, params, TrainingOptions(config.optimizer))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[backend.dtype]
    step_plain = plain_step(plain_twin(config, vocab_size, params, dtype), config)

    def run_ours(batch: Batch, lr: float) -> float:
        loss = float(backend.ops.to_numpy(ours.accumulate(batch, 1.0).loss))
        ours.step(lr, ours.gradient_norm())
        return loss

    def run_plain(batch: Batch, lr: float) -> float:
        return float(step_plain(batch, lr))

    random = np.random.default_rng(0)
    shape = (config.training.batch_size // config.training.gradient_accumulation, config.data.sequence_length)

    def batch() -> Batch:
        # Token frequencies fall like 1 / rank, as in text.
        ranks = np.exp(random.random((shape[0], shape[1] + 1)) * np.log(vocab_size)).astype(np.int64) - 1
        return Batch(ranks[:, :-1].copy(), ranks[:, 1:].copy())

    times: dict[str, list[float]] = {"moeport": [], "plain": []}
    steps = {"moeport": run_ours, "plain": run_plain}
    worst = 0.0
    for round_number in range(arguments.rounds + 5):
        data, losses = batch(), []
        order = list(steps) if round_number % 2 else list(reversed(steps))
        for name in order:
            started = time.perf_counter()
            losses.append(steps[name](data, 1e-4))
            if round_number >= 5:
                times[name].append(time.perf_counter() - started)
        if round_number < 3:
            worst = max(worst, abs(losses[0] - losses[1]) / losses[0])

    tokens = shape[0] * shape[1]
    flops = config.model.training_flops_per_token(vocab_size, shape[1]) * tokens
    limit = flops / backend.matmul_flops_per_second()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["moeport"], times["plain"], strict=True))
    counts = config.model.parameter_counts(vocab_size)
    print(
        f"{arguments.config}: {counts.total:,} parameters, {tokens:,} tokens per step, "
        f"{backend.device}, {backend.dtype}"
    )
    print(f"losses of the first steps differ by at most {worst:.1e} relative")
    for name, seconds in medians.items():
        print(f"{name:10s} {seconds * 1e3:8.1f} ms per step (median of {arguments.rounds})")
    print(f"{'limit':10s} {limit * 1e3:8.1f} ms: {flops / 1e9:.1f} GFLOP at the speed of a large matrix product")
    print(f"moeport / plain: {ratio:.3f} (median of pairs; target at most {TARGET})")


if __name__ == "__main__":
    main()
