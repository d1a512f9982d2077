"""Training speed on an idle machine, and beside a process that keeps one core busy, by how threads wait.

    python benchmarks/busy_machine.py [CONFIG] [--rounds 3] [--seconds 12] [--dtype bfloat16] [--policies A,B]

Each round trains the model of the config on random tokens for some seconds with each policy, idle and then busy, each
in a process of its own; printed are medians over the rounds. The busy process has the lowest priority and a session of
its own, as a program of another terminal has. `moeport` is what moeport does by itself, `unwatched` is PyTorch's
default, and the others set environment variables. Losses are compared to the bit among policies with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POLICIES: dict[str, dict[str, str]] = {
    "moeport": {},
    "unwatched": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
"""Environment variables by policy."""
OURS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
WARM_UP_SECONDS = 2.0
"""Left out of the speed: first steps are slower, and the watch needs a moment."""


def work(policy: str, config_file: str, dtype: str, seconds: float) -> dict[str, Any]:
    """Train for some seconds in this process; returns speed, losses, threads, and the share of time spent waiting."""
    import numpy as np

    from moeport.backends import contention, get_backend
    from moeport.backends.base import TrainingOptions
    from moeport.config import load_config
    from moeport.core.parameters import initial_parameters
    from moeport.model.batch import Batch
    from moeport.model.decoder import DecoderLM

    if policy == "unwatched":
        setattr(contention.Watch, "start", lambda watch: None)  # noqa: B010
    config = load_config(config_file, [f"backend.dtype={dtype}"])
    backend = get_backend(config.backend)
    vocab_size = config.model.vocab_size or int(getattr(config.data.tokenizer, "vocab_size", 257))
    shapes = DecoderLM(config.model, vocab_size)
    params = initial_parameters(shapes.parameter_specs(), config.training.seed)
    model = backend.training_model(shapes, params, TrainingOptions(config.optimizer))
    size = (config.training.batch_size, config.data.sequence_length)
    random, waiting = np.random.default_rng(0), contention.WaitClock()
    losses: list[float] = []
    ends: list[float] = []
    news: list[str] = []
    started, waited = time.perf_counter(), waiting.read()
    while not ends or ends[-1] < seconds:
        token_BS = random.integers(0, vocab_size, (size[0], size[1] + 1))
        terms = model.accumulate(Batch(token_BS[:, :-1].copy(), token_BS[:, 1:].copy()), 1.0)
        losses.append(float(backend.ops.to_numpy(terms.loss)))
        model.step(1e-3, model.gradient_norm())
        ends.append(time.perf_counter() - started)
        news += backend.news()
    warm = next((index for index, end in enumerate(ends[:-1]) if end > WARM_UP_SECONDS), max(0, len(ends) - 2))
    steps, took = (len(ends) - 1 - warm, ends[-1] - ends[warm]) if len(ends) > 1 else (1, ends[0])
    return {
        "tokens_per_second": steps * size[0] * size[1] / took,
        "share": (waiting.read() - waited) / (time.perf_counter() - started),
        "losses": losses,
        "threads": backend.threads(),
        "news": news,
    }


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """A process that keeps a core busy, with the lowest priority and in its own session."""
    if not wanted:
        yield
        return
    process = subprocess.Popen(["nice", "-n", "19", sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        time.sleep(0.3)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def measure(policy: str, is_busy: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process with that policy measures."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | POLICIES[policy]
    command = [sys.executable, __file__, arguments.config, "--work", policy, "--seconds", str(arguments.seconds)]
    command += ["--dtype", arguments.dtype]
    with busy(is_busy):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{policy}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare_losses(results: list[tuple[str, bool, dict[str, Any]]]) -> str:
    """Whether the losses of all policies with several threads begin alike, to the bit."""
    found = [result["losses"] for policy, _, result in results if policy != "OMP_NUM_THREADS=1"]
    shortest = min(map(len, found))
    equal = all(losses[:shortest] == found[0][:shortest] for losses in found)
    return f"losses of the first {shortest} steps, with as many threads: {'equal to the bit' if equal else 'DIFFERENT'}"


def show(results: list[tuple[str, bool, dict[str, Any]]], policies: list[str]) -> None:
    """Print a Markdown table of medians over rounds, and what was noticed."""

    def median(policy: str, is_busy: bool, key: str) -> float:
        return statistics.median(r[key] for name, was, r in results if (name, was) == (policy, is_busy))

    base = median("unwatched" if "unwatched" in policies else policies[0], False, "tokens_per_second")
    print("| policy | idle, tokens/s | busy, tokens/s | idle / base | busy / base | waiting idle | waiting busy |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for policy in policies:
        speeds = [median(policy, is_busy, "tokens_per_second") for is_busy in (False, True)]
        shares = [median(policy, is_busy, "share") for is_busy in (False, True)]
        cells = [f"{s:,.0f}" for s in speeds] + [f"{s / base:.1%}" for s in speeds] + [f"{s:.0%}" for s in shares]
        print(f"| {policy} | {' | '.join(cells)} |")
    print(f"\n{compare_losses(results)}")
    for policy, is_busy, result in results:
        for line in result["news"]:
            print(f"{policy}, {'busy' if is_busy else 'idle'}: {line}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of training in each process")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--json", help="write all results")
    parser.add_argument("--work", choices=POLICIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.config, arguments.dtype, arguments.seconds)))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the busy process would stay
    policies, results = arguments.policies.split(","), []
    for number in range(arguments.rounds):
        for is_busy in (False, True):
            for policy in policies[number % len(policies) :] + policies[: number % len(policies)]:
                result = measure(policy, is_busy, arguments)
                results.append((policy, is_busy, result))
                print(f"{policy}, {'busy' if is_busy else 'idle'}: {result['tokens_per_second']:,.0f}", file=sys.stderr)
    show(results, policies)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
