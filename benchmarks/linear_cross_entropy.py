"""The output projection and its loss, forward and backward: ours, and the forms of PyTorch 2.13, in turns.

    python benchmarks/linear_cross_entropy.py [--shape 1024,128,4096] [--dtype float32] [--rounds 7] [--threads 2]

The shape is tokens, width, vocabulary. Printed are medians over the rounds, their ratio to ours, the peak of what was
allocated during one call, and how far the loss is from float64. PyTorch's have no z-loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeport.backends.torch.ops import TorchOps

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders() -> dict[str, Loss]:
    """By name; each takes hidden states, a projection in float32 and targets."""
    ops = TorchOps(torch.device("cpu"))
    functional: Any = F
    options: Any = torch.nn.LinearCrossEntropyOptions

    def of_torch(chosen: Any) -> Loss:
        return lambda x, w, t: functional.linear_cross_entropy(x, w.to(x.dtype), t, options=chosen)

    return {
        "ours": lambda x, w, t: ops.linear_cross_entropy(x, w, t, 0.0)[0],
        "linear, cross_entropy": of_torch(None),
        "chunked": of_torch(options()),
        "chunked, accurate": of_torch(options(acc_policy="accurate")),
    }


def run(loss: Loss, x: Tensor, w: Tensor, t: Tensor) -> tuple[float, float]:
    """Seconds of forward and backward, and the loss."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    started = time.perf_counter()
    value = loss(x, w, t)
    value.backward()
    return time.perf_counter() - started, float(value)


def peak(loss: Loss, *arrays: Tensor) -> int:
    """Most bytes that one call has allocated at a time."""
    with torch.profiler.profile(profile_memory=True) as recorded:
        run(loss, *arrays)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1024,128,4096")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    tokens, width, vocabulary = map(int, given.shape.split(","))
    x = torch.randn(tokens, width).to(getattr(torch, given.dtype))
    w, t = torch.randn(vocabulary, width) * width**-0.5, torch.randint(0, vocabulary, (tokens,))
    true = float(F.cross_entropy(x.double() @ w.double().t(), t))
    losses = contenders()
    spent: dict[str, list[float]] = {name: [] for name in losses}
    found = {name: run(loss, x, w, t)[1] for name, loss in losses.items()}
    for _ in range(given.rounds):
        for name, loss in losses.items():
            spent[name].append(run(loss, x, w, t)[0])
    own = statistics.median(spent["ours"])
    for name, loss in losses.items():
        seconds = statistics.median(spent[name])
        most = peak(loss, x, w, t) / 2**20
        print(
            f"{name:22s} {seconds * 1e3:8.1f} ms  {seconds / own:5.2f} of ours  peak {most:7.1f} MiB"
            f"  loss off by {abs(found[name] - true):.1e}"
        )


if __name__ == "__main__":
    main()
