"""Runs of models of a chosen size on several ranks of this machine, for the benchmarks of memory and of saving.

A rank is a process that runs a script of this folder, as torchrun or msrun would start it. The script is this folder's,
and the package may be that of another commit, from a git worktree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeport.launch.launcher import NodeProcess, node_processes
from moeport.launch.local import free_port, local_job

LAUNCHERS = {"torch": "torchrun", "mindspore": "msrun"}
BATCH, LENGTH = 8, 32
"""Sequences of a step, and tokens of each: few, so that outputs of layers are small beside the weights."""


@dataclass(frozen=True)
class Size:
    """A decoder whose parameters are mostly those of its experts."""

    layers: int = 4
    width: int = 512
    experts: int = 16
    hidden: int = 1024

    @property
    def parameters(self) -> int:
        """About how many there are: of experts and attention."""
        return self.layers * self.width * (3 * self.experts * self.hidden + 3 * self.width)

    @property
    def tiny(self) -> Size:
        """As many arrays, with next to nothing in them."""
        return replace(self, width=16, hidden=16)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """An option for each field."""
        for name, default in cls().__dict__.items():
            parser.add_argument(f"--{name}", type=int, default=default)

    @classmethod
    def of(cls, given: argparse.Namespace) -> Size:
        """The size that the options give."""
        return cls(**{name: getattr(given, name) for name in cls().__dict__})


def corpus(folder: Path) -> Path:
    """A folder of text files in `train` and a short one in `held-out`, written if they are not there."""
    for part, files, lines in (("train", 40, 200), ("held-out", 1, 12)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(files):
            text = "".join(f"line {line} of text {number}: {line * number % 97}\n" for line in range(lines))
            (folder / part / f"{number}.txt").write_text(text)
    return folder


def config_of(size: Size, backend: str, ranks: int, folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run in `folder` in which `ranks` ranks share the experts; `sections` are laid over it."""
    texts = corpus(folder.parent / "corpus")
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "num_layers": size.layers,
            "d_model": size.width,
            "tie_embeddings": True,
            "attention": {"num_heads": max(1, size.width // 64)},
            "moe": {
                "num_experts": size.experts,
                "expert_hidden": size.hidden,
                "router": {"name": "topk", "top_k": 1, "normalize_gates": False},
            },
        },
        "data": {
            "source": {
                "name": "files",
                "paths": [str(texts / "train")],
                "validation_paths": [str(texts / "held-out")],
            },
            "tokenizer": {"name": "byte"},
            "sequence_length": LENGTH,
            "cache_dir": str(folder.parent / "cache"),
        },
        "training": {"steps": 2, "batch_size": BATCH, "evaluation_interval": 0},
        "optimizer": {"schedule": {"name": "constant"}},  # so that a run may become longer
        "parallelism": {"expert": ranks},
        "metrics": {"report": False, "tensorboard": False, "peak_tflops": 1.0, "sample_tokens": 0},
        "backend": {"name": backend, "device": "cpu", "dtype": "float32", "compile": False},
    }
    return {key: {**values.get(key, {}), **sections.get(key, {})} for key in {**values, **sections}}


def processes(backend: str, ranks: int, script: Path, arguments: Sequence[str]) -> list[NodeProcess]:
    """What is started: a process without a launcher if there is one rank."""
    if ranks == 1:
        return [NodeProcess(0, [sys.executable, str(script), *arguments], {})]
    launcher: Any = LAUNCHERS[backend]
    made = node_processes(launcher, 1, ranks, "127.0.0.1", arguments, free_port())
    return [replace(process, command=_of_script(process.command, script)) for process in made]


def _of_script(command: list[str], script: Path) -> list[str]:
    place = command.index("moeport")
    return [*command[: place - 1], str(script), *command[place + 1 :]]


def run(script: str, backend: str, ranks: int, config: dict[str, Any], options: Sequence[str], tree: Path) -> list[Any]:
    """Run a script of this folder on all ranks; returns what each wrote to the file that it was given.

    Args:
        script: a file beside this one, called with CONFIG, the stem of the file to write, and the options.
        backend: torch or mindspore.
        ranks: how many processes.
        config: of the run, which is JSON and so YAML.
        options: further arguments of the script.
        tree: the repository whose package is used.

    Raises SystemExit, with what a failed rank printed.
    """
    folder = Path(config["run"]["dir"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    file, stem = folder / "config.yaml", folder / "found"
    file.write_text(json.dumps(config))
    for old in folder.glob("found.*"):
        old.unlink()
    started = processes(backend, ranks, Path(__file__).with_name(script), [str(file), str(stem), *options])
    own = [replace(one, environment={**one.environment, "PYTHONPATH": str(tree)}) for one in started]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    with local_job(own, folder, threads, cwd=folder) as job:
        if job.wait() is not None:
            job.end()
            printed = "\n".join(path.read_text(errors="replace")[-3000:] for path in job.outputs)
            raise SystemExit(f"{backend} on {ranks} ranks failed:\n{printed}")
    return [json.loads(Path(f"{stem}.{rank}").read_text()) for rank in range(ranks)]


def write_found(stem: str, found: Any) -> None:
    """Called by a rank: write what it found; msrun's scheduler, which runs the script too, writes nothing."""
    from moeport.launch.launcher import launched

    launch = launched()
    rank = launch.rank if launch else 0
    if rank >= 0:
        Path(f"{stem}.{rank}").write_text(json.dumps(found))
