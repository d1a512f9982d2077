"""Choosing the best experts of each token and sorting assignments by expert: what moeport does against full sorts.

`python benchmarks/router.py [--device cuda] [--rounds 9] [--tiny]` prints the milliseconds of both, medians of rounds
in which they take turns, and their ratio. The results are compared first: they are equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moeport.backends.torch.ops import TorchOps

SHAPES = [(4096, 8, 2), (8192, 64, 8), (16384, 128, 8), (16384, 256, 8)]
"""Tokens, experts and choices per token."""


def contenders(ops: TorchOps, tokens: int, experts: int, choices: int) -> dict[str, tuple[Callable[[], Any], ...]]:
    """By task: a full sort, and what moeport does."""
    torch.manual_seed(0)
    logits_TE: Any = torch.randn(tokens, experts, device=ops.device)
    expert_N: Any = torch.randint(experts, (tokens * choices,), device=ops.device)
    return {
        "top-k": (
            lambda: logits_TE.sort(stable=True, dim=-1, descending=True).indices[..., :choices],
            lambda: ops.topk_ids(logits_TE, choices),
        ),
        "sort": (
            lambda: (
                order := expert_N.argsort(stable=True),
                order.argsort(stable=True),
                ops.bincount(expert_N, experts),
            ),
            lambda: ops.sort_by_group(expert_N, experts),
        ),
    }


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run, waited for."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Print a line per shape and task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="check the script")
    options = parser.parse_args()
    ops = TorchOps(torch.device(options.device))
    for tokens, experts, choices in [(64, 8, 2)] if options.tiny else SHAPES:
        for task, (sorting, ours) in contenders(ops, tokens, experts, choices).items():
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (sorting(), ours())), strict=True):
                assert torch.equal(a, b)
            times = [[seconds(run, ops.device) for run in (sorting, ours)] for _ in range(options.rounds)]
            before, now = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
            shape = f"T {tokens} E {experts} K {choices}"
            print(f"{task:6} {shape:22} full sorts {before:8.2f} ms  moeport {now:8.2f} ms  ratio {now / before:.2f}")


if __name__ == "__main__":
    main()
