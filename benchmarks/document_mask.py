"""Tokens per second of a training step on the CPU: attention that stays within documents, over attention that does not.

    OMP_NUM_THREADS=2 python benchmarks/document_mask.py [--rounds 4] [--small]

Both steps are of one model, take turns, and see the same tokens; each figure is a median over rounds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import TrainingModel, TrainingOptions
from moeport.config.model import AttentionConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.data.document_starts import document_starts, hidden_share
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM

VOCABULARY, END = 4096, 0
CASES = ((8, 256, 128), (8, 512, 256), (8, 512, 2048), (2, 2048, 512))
SMALL = ((2, 16, 4),)
"""Sequences, tokens of each, and the mean number of tokens per document."""


def build() -> TrainingModel:
    """2 layers, D 256, 4 heads on 2, 8 experts of 256: 5 M parameters, in float32."""
    attention, moe = AttentionConfig(num_heads=4, num_kv_heads=2), MoEConfig(num_experts=8, expert_hidden=256)
    shapes = DecoderLM(ModelConfig(num_layers=2, d_model=256, attention=attention, moe=moe), VOCABULARY)
    backend = get_backend(BackendConfig(name="torch", device="cpu", dtype="float32"))
    params = initial_parameters(shapes.parameter_specs(), 0)
    return backend.training_model(shapes, params, TrainingOptions(OptimizerConfig()))


def seconds(model: TrainingModel, batch: Batch) -> float:
    """How long a step takes."""
    start = time.perf_counter()
    model.accumulate(batch, 1.0)
    model.step(1e-4, model.gradient_norm())
    return time.perf_counter() - start


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="one case that takes a moment")
    given = parser.parse_args()
    model = build()
    for sequences, length, mean in SMALL if given.small else CASES:
        drawn = np.random.default_rng(0)
        tokens = drawn.integers(END + 1, VOCABULARY, (sequences, length + 1))
        tokens[drawn.random(tokens.shape) < 1 / mean] = END
        plain = Batch(tokens[:, :-1], tokens[:, 1:])
        document_BS = document_starts(plain.token_BS, END)
        assert document_BS is not None
        masked = replace(plain, document_BS=document_BS)
        times = [(seconds(model, plain), seconds(model, masked)) for _ in range(given.rounds + 1)][1:]
        off, on = (sequences * length / median(column) for column in zip(*times, strict=True))
        print(
            f"{sequences} sequences of {length:4}, {hidden_share(document_BS):4.0%} of the pairs hidden: "
            f"{off:6.0f} tokens per second without the mask, {on:6.0f} with it ({on / off:.2f})"
        )


if __name__ == "__main__":
    main()
