"""Training steps with and without torch.compile, in turns, on random tokens.

    python benchmarks/compiled_step.py [CONFIG] [--dtype bfloat16] [--rounds 10] [--routers topk,switch]

Each round takes one step of the model of the config with each router, plain and compiled; the first two, in which
everything is compiled, do not count. Printed are medians, and the ratio of compiled to plain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.config import load_config
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM

WARM_UP = 2


def main() -> None:
    """Print a line for each router."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--routers", default="topk")
    given = parser.parse_args()
    for router in given.routers.split(","):
        plain, compiled = (Subject(given.config, given.dtype, router, compiles) for compiles in (False, True))
        times: dict[Subject, list[float]] = {plain: [], compiled: []}
        for number in range(WARM_UP + given.rounds):
            for subject, spent in times.items():
                spent.append(subject.step(number))
        first = times[compiled][0]
        a, b = (statistics.median(spent[WARM_UP:]) for spent in times.values())
        print(
            f"{router:12s} plain {a * 1e3:7.1f} ms  compiled {b * 1e3:7.1f} ms  ratio {b / a:.2f}  "
            f"first compiled step {first:.1f} s",
            flush=True,
        )


class Subject:
    """A model that trains."""

    def __init__(self, config_file: str, dtype: str, router: str, compiles: bool):
        self.config = load_config(config_file, [f"backend.dtype={dtype}", f"model.moe.router={{name: {router}}}"])
        self.backend = get_backend(self.config.backend)
        vocab_size: Any = getattr(self.config.data.tokenizer, "vocab_size", 257)
        self.shapes = DecoderLM(self.config.model, int(vocab_size))
        params = initial_parameters(self.shapes.parameter_specs(), self.config.training.seed)
        options = TrainingOptions(self.config.optimizer, compile=compiles)
        self.model = self.backend.training_model(self.shapes, params, options)
        self.random = np.random.default_rng(0)

    def step(self, number: int) -> float:
        """Take one; returns the seconds."""
        size = self.config.training.batch_size, self.config.data.sequence_length
        tokens = self.random.integers(0, 256, (size[0], size[1] + 1))
        batch = Batch(tokens[:, :-1], tokens[:, 1:], self.shapes.noise(*size, 0, number))
        started = time.perf_counter()
        terms: Any = self.model.accumulate(batch, 1.0)
        self.model.step(1e-3, self.model.gradient_norm())
        float(terms.loss)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
