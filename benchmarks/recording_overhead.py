"""What recording costs: training steps with statistics on record, with a recorder that is idle, and with none.

The three do the same step on the same batch in turn, so that a noisy machine disturbs all alike; the median of the
ratios is what counts. With `--cpu-time` it is that of CPU time, which other processes disturb less: use one thread
then. Recorded are the statistics of every tensor of the forward pass, all routing decisions and the losses.

    python benchmarks/recording_overhead.py [CONFIG] [--rounds 40] [--cpu-time] [--set key=value ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.config import load_config
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.parity.model import RecordedLM
from moeport.parity.recorder import Recorder
from moeport.parity.recording import STATISTICS

LIMIT = 1.10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time in the place of wall time")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    config = load_config(arguments.config, ["backend.dtype=float32", *arguments.overrides])
    backend = get_backend(config.backend)
    vocab_size = config.model.vocab_size or int(getattr(config.data.tokenizer, "vocab_size", 257))
    recorder, idle = Recorder(STATISTICS), Recorder(STATISTICS)
    idle.stop()
    shapes = {
        "none": DecoderLM(config.model, vocab_size),
        "idle": RecordedLM(config.model, vocab_size, idle),
        "statistics": RecordedLM(config.model, vocab_size, recorder),
    }
    params = initial_parameters(shapes["none"].parameter_specs(), config.training.seed)
    options = TrainingOptions(config.optimizer)
    models = {name: backend.training_model(lm, params, options) for name, lm in shapes.items()}
    recorded = 0

    def step(name: str) -> Callable[[Batch], float]:
        model = models[name]

        def run(batch: Batch) -> float:
            nonlocal recorded
            loss = float(backend.ops.to_numpy(model.accumulate(batch, 1.0).loss))
            model.step(1e-4, model.gradient_norm())
            if name == "statistics":
                recorded = len(recorder.take())
            return loss

        return run

    steps = {name: step(name) for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    random = np.random.default_rng(0)
    shape = (config.training.batch_size // config.training.gradient_accumulation, config.data.sequence_length)
    names = list(steps)
    for number in range(arguments.rounds + 3):
        tokens = random.integers(0, vocab_size, (shape[0], shape[1] + 1))
        batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())
        losses = set()
        for name in names[number % 3 :] + names[: number % 3]:
            started = clock()
            losses.add(steps[name](batch))
            if number >= 3:
                times[name].append(clock() - started)
        assert len(losses) == 1, losses

    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{arguments.config}: {shape[0] * shape[1]:,} tokens per step, {backend.name} on {backend.device}")
    print(
        f"{'recording':12s} {'ms per step':>11s} {'ratio':>7s}   "
        f"(medians of {arguments.rounds}; losses equal to the bit)"
    )
    for name in names:
        pairs = zip(times[name], times["none"], strict=True)
        print(f"{name:12s} {medians[name] * 1e3:11.1f} {statistics.median(a / b for a, b in pairs):7.3f}")
    print(f"{recorded} tensors per step; statistics may cost at most {LIMIT - 1:.0%}")


if __name__ == "__main__":
    main()
