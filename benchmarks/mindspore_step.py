"""A training step on MindSpore over the same step on PyTorch, both on the CPU, one after the other in turn.

    python benchmarks/mindspore_step.py [--checkpoint RUN_DIR] [--steps 20] [--pynative]

Each framework has a process of its own, since the threads of one would wait in busy loops while the other computes. A
step is forward, backward, gradient norm and AdamW on the quickstart's model and batch. Without `--checkpoint` the
weights are the initial ones, whose router is far from balance; with it they are those of a trained run. Compilation is
reported apart.
"""

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[1]


def worker(pipe: Connection, name: str, run_dir: str | None, compiled: bool | None) -> None:
    """Answer each index that comes through the pipe with the loss and the times of one step; None ends."""
    from moeport.backends import get_backend
    from moeport.backends.base import TrainingOptions
    from moeport.config import load_config
    from moeport.config.training import BackendConfig
    from moeport.core.parameters import initial_parameters
    from moeport.data import Sampler, prepare_data
    from moeport.model.batch import Batch
    from moeport.model.decoder import DecoderLM
    from moeport.training.checkpoint import find_checkpoint, open_checkpoint

    config = load_config(ROOT / "configs/quickstart.yaml")
    data = prepare_data(config.data, report=lambda text: None).train
    lm = DecoderLM(config.model, 4096)
    backend = get_backend(BackendConfig(name=name, device="cpu", compile=compiled))
    params = initial_parameters(lm.parameter_specs(), 0)
    if run_dir:
        params = dict(open_checkpoint(find_checkpoint(Path(run_dir) / "checkpoints", "latest")).model)
    sampler = Sampler(data.num_sequences, config.training.batch_size, config.training.seed)
    model = backend.training_model(lm, params, TrainingOptions(config.optimizer))

    def step(index: int) -> tuple[float, float, float, int]:
        tokens, targets = data.batch(sampler.indices(index))
        start = time.perf_counter()
        terms = model.accumulate(Batch(tokens, targets, lm.noise(4, tokens.shape[1], 0, index)), 1.0)
        loss = float(backend.ops.to_numpy(terms.loss))
        middle = time.perf_counter()
        norm = model.gradient_norm()
        float(backend.ops.to_numpy(norm))
        model.step(1e-5, norm)
        model.parameters(["final_norm.weight"])
        return loss, middle - start, time.perf_counter() - middle, int(backend.ops.to_numpy(terms.served_LE).max())

    first = time.perf_counter()
    step(0)
    pipe.send((time.perf_counter() - first, backend.versions()))
    while (index := pipe.recv()) is not None:
        pipe.send((*step(index), backend.compilations()[0]))


def main() -> None:
    """Run both, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="RUN_DIR", help="a finished run of configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pynative", action="store_true", help="MindSpore operation by operation")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    names, pipes, processes = ("torch", "mindspore"), [], []
    for name in names:
        here, there = context.Pipe()
        compiled = False if options.pynative and name == "mindspore" else None
        process = context.Process(target=worker, args=(there, name, options.checkpoint, compiled))
        process.start()
        pipes.append(here)
        processes.append(process)
        seconds, versions = here.recv()
        print(f"{name} {versions[name]}: first step {seconds:.1f} s, compilation included")
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    worst = 0.0
    for index in range(1, options.steps + 1):
        losses = []
        for name, pipe in zip(names, pipes, strict=True):
            pipe.send(index)
            loss, *rest = pipe.recv()
            losses.append(loss)
            times[name].append(tuple(rest))
        worst = max(worst, abs(losses[1] / losses[0] - 1))
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    print(f"losses agree to {worst:.1e}; busiest expert {max(t[2] for t in times['torch'])} of 128 rows at balance")
    print(
        f"compilations in the measured steps and before: {times['mindspore'][-1][3]}, first {times['mindspore'][0][3]}"
    )
    for statistic in (statistics.median, min):
        forward, update = ({name: statistic(t[part] for t in times[name]) for name in names} for part in (0, 1))
        whole = {name: statistic(t[0] + t[1] for t in times[name]) for name in names}
        for label, values in (("forward and backward", forward), ("norm and AdamW", update), ("whole step", whole)):
            torch, mindspore = (f"{name} {1e3 * values[name]:7.1f} ms" for name in names)
            ratio = values["mindspore"] / values["torch"]
            print(f"{statistic.__name__:7s} {label:22s} {torch}   {mindspore}   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
