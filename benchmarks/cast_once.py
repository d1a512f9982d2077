"""Time of a training step in bfloat16: weights cast once per update, over weights cast at every use.

    OMP_NUM_THREADS=1 python benchmarks/cast_once.py [--device cuda] [--rounds 8]

Both models are in one process and take turns; each figure is a median over rounds, and the ratio that of each round. On
the CPU the time is that of the processor, which other processes disturb less; give it one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.torch.compute_copies import ComputeCopies
from moeport.backends.torch.device import synchronize
from moeport.backends.torch.module import TransformerModule
from moeport.config.model import AttentionConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import ParameterSpec, initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.routers.topk import TopKConfig

VOCABULARY = 4096
CASES = {
    "1 micro-batch of 512 tokens": (1, 2, False),
    "8 micro-batches of 256 tokens": (8, 1, False),
    "8 micro-batches of 256 tokens, recomputed": (8, 1, True),
}
"""Number of micro-batches, sequences in each, and whether blocks are recomputed."""
SEQUENCE = 256
ORIGINAL = ComputeCopies.__init__


def without_copies(
    self: ComputeCopies, module: TransformerModule, specs: Mapping[str, ParameterSpec], dtype: torch.dtype, trains: bool
) -> None:
    """As if no parameter could be cast once."""
    ORIGINAL(self, module, {n: replace(spec, in_compute_type=False) for n, spec in specs.items()}, dtype, trains)


def build(device: str, casts_once: bool, recomputes: bool) -> Any:
    """2 layers, D 512, 32 experts of 256, top-2: 27 M parameters in blocks."""
    moe = MoEConfig(num_experts=32, expert_hidden=256, router=TopKConfig(top_k=2))
    shapes = DecoderLM(
        ModelConfig(num_layers=2, d_model=512, attention=AttentionConfig(num_heads=8), moe=moe), VOCABULARY
    )
    backend = get_backend(BackendConfig(name="torch", device=device, dtype="bfloat16"))
    params = initial_parameters(shapes.parameter_specs(), 0)
    options = TrainingOptions(OptimizerConfig(), activation_checkpointing=recomputes)
    with mock.patch.object(ComputeCopies, "__init__", ORIGINAL if casts_once else without_copies):
        return backend.training_model(shapes, params, options)


def step(model: Any, batches: list[Batch]) -> float:
    """Seconds of one step, on the CPU those of the processor."""
    device = model.optimizer.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    started = clock()
    for number, batch in enumerate(batches, 1):
        model.accumulate(batch, 1 / len(batches), number == len(batches))
    model.step(1e-3, model.gradient_norm())
    synchronize(device)
    return clock() - started


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    for name, (parts, sequences, recomputes) in CASES.items():
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (parts, sequences, SEQUENCE + 1))
        batches = [Batch(ids_BS[:, :-1], ids_BS[:, 1:]) for ids_BS in ids]
        once, every = (build(options.device, casts_once, recomputes) for casts_once in (True, False))
        for model in (once, every):
            step(model, batches)
        times = []
        for number in range(options.rounds):
            order = (once, every) if number % 2 else (every, once)
            seconds = {model: step(model, batches) for model in order}
            times.append((seconds[once], seconds[every]))
        ms = [1e3 * median(column) for column in zip(*times, strict=True)]
        ratio = median(a / b for a, b in times)
        print(f"{name}: once per update {ms[0]:.0f} ms, at every use {ms[1]:.0f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
