"""A matrix product on the CPU with numbers of rows that are new to it, against the same ones seen before.

`python benchmarks/new_shapes.py [--dtype bfloat16] [--columns 128] [--outputs 512] [--rounds 60] [--tiny]` prints the
medians in milliseconds and their ratio, in both types unless one is named. Before the rounds the threads are warm.
With ONEDNN_VERBOSE=profile_create in the environment, oneDNN prints how long it prepares each product.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

MOST_ROWS = 2048


def seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Of one product."""
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - start


def measured(dtype: torch.dtype, columns: int, outputs: int, rounds: int) -> tuple[float, float]:
    """Median seconds of products with a new number of rows, and of the same again."""
    x, weight = torch.randn(MOST_ROWS, columns).to(dtype), torch.randn(outputs, columns).to(dtype)
    for _ in range(20):
        seconds(x, weight)
    new, seen = [], []
    for rows in random.Random(0).sample(range(MOST_ROWS // 8, MOST_ROWS), rounds):
        new.append(seconds(x[:rows], weight))
        seen.append(seconds(x[:rows], weight))
    return statistics.median(new), statistics.median(seen)


def main() -> None:
    """Print a line per type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--outputs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="check the script")
    options = parser.parse_args()
    for name in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
        new, seen = measured(
            getattr(torch, name), options.columns, options.outputs, 2 if options.tiny else options.rounds
        )
        print(f"{name:9} new {1e3 * new:7.3f} ms  seen {1e3 * seen:7.3f} ms  ratio {new / seen:.1f}")


if __name__ == "__main__":
    main()
