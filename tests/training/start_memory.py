"""How much memory a rank takes to place a model and to load its state, beside what it holds then.

Run as a script in each process of a job: FOLDER. Each rank writes FOLDER/RANK.json: for each number of ranks that share
the experts, in bytes, the parameters of the whole model, and by how much the process grew at most.
"""

import contextlib
import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np

from moeport.backends import get_backend
from moeport.backends.torch import placing
from moeport.comm.mesh import Mesh
from moeport.core.parameters import BLOCK_ENTRIES, InitialWeights
from moeport.core.weights import Weights
from moeport.launch.launcher import launched
from moeport.model.build import build_model
from moeport.training.placed import place_model
from tests.training.tiny import tiny_config

MODEL = {
    "num_layers": 3,
    "d_model": 256,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "moe": {"num_experts": 8, "expert_hidden": 1024},
}
TINY = MODEL | {"d_model": 8, "moe": {"num_experts": 8, "expert_hidden": 8}}
"""What is placed first, so that libraries and modules are in memory when something is measured."""


class Moments(Weights):
    """The state of AdamW for some parameters, all of it 1."""

    def __init__(self, specs):
        trained = [spec for spec in specs if spec.trainable]
        self.shapes = {f"{m}.{spec.name}": spec.shape for spec in trained for m in ("exp_avg", "exp_avg_sq")}

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return "float32"

    def read(self, name, box):
        return np.ones(box.shape, np.float32)

    @property
    def names(self):
        return self.shapes


class Growth:
    """By how much the memory of this process was larger, at most, than when this was made."""

    def __init__(self):
        gc.collect()
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is used again without being seen
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what it has now
        self.before = self._peak()

    def _peak(self):
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    @property
    def bytes(self):
        return self._peak() - self.before


def measure(backend, world, expert, folder, model=MODEL):
    config = tiny_config(folder, model=model, parallelism={"expert": expert})
    shapes = build_model(config.model, config.data, 257)
    specs = shapes.parameter_specs()
    growth = Growth()
    placed = place_model(config, backend, shapes, InitialWeights(specs, 0), Mesh(world, expert))
    started = growth.bytes
    given = sum(shard.array.nbytes for shard in placed.arrays.shards())
    given_peak = growth.bytes
    placed.arrays.load_optimizer_state(Moments(specs), 1)
    given += sum(shard.array.nbytes for shard in placed.arrays.optimizer_shards())
    return {
        "whole": sum(4 * spec.size for spec in specs),
        "started": started,
        "given out": given_peak,
        "resumed": growth.bytes,
        "written": given,
    }


def main(folder):
    launch = launched()
    placing.PIECE_ENTRIES = BLOCK_ENTRIES  # 4 MiB, of a model that is small
    backend = get_backend(tiny_config(folder / str(launch.rank)).backend)
    with backend.communicator(launch, 120.0) as world:
        measure(backend, world, 2, folder / str(world.rank), TINY)
        found = {expert: measure(backend, world, expert, folder / str(world.rank)) for expert in (1, 2)}
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
