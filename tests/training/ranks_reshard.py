"""A model is trained and written by the ranks of a job, and read from what other numbers of ranks have written.

Run as a script in each process of a job: FOLDER READ..., where READ are numbers of ranks whose checkpoints are there.
"""

import sys
from pathlib import Path

import numpy as np

from moeport.comm.mesh import Mesh
from moeport.core.weights import read_part
from moeport.files import put_folder
from moeport.launch.launcher import launched
from moeport.training.checkpoint import open_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.checkpoint_writing import complete, part_of, write_rank
from moeport.training.placed import place_model
from moeport.training.task import build_task
from tests.training.ranks import backend_of, trainer_of
from tests.training.tiny import tiny_config

META = CheckpointMeta(2, 20, None, "t", "d", {}, "0")


def config_of(folder, size):
    return tiny_config(
        folder,
        model={"moe": {"router": {"name": "sigmoid_bias"}}},
        training={"batch_size": 8},
        parallelism={"expert": min(size, 2)},
    )


def path_of(folder, size):
    return folder / f"by-{size}" / "step-000002"


def write(model, world, final):
    """What the saver does, without a run."""
    folder = final.with_name("temporary")
    if world.rank == 0:
        folder.mkdir(parents=True)
    world.barrier()
    parts = ([part_of(shard) for shard in shards] for shards in (model.shards(), model.optimizer_shards()))
    write_rank(folder, world.rank, world.size, *parts)
    if world.rank == 0:
        complete(folder, META, world.size, 60.0)
        put_folder(folder, final)
    world.barrier()


def check_read(config, world, task, path):
    """The parts that a model has after it was filled from a checkpoint are those of the checkpoint, bit for bit."""
    checkpoint = open_checkpoint(path)
    mesh = Mesh(world, config.parallelism.expert)
    model = place_model(config, backend_of(config.backend), task.model(), checkpoint.model, mesh).arrays
    model.load_optimizer_state(checkpoint.optimizer, 2)
    for shards, stored in ((model.shards(), checkpoint.model), (model.optimizer_shards(), checkpoint.optimizer)):
        sizes = dict.fromkeys(stored, 0.0)
        for shard in shards:
            want = read_part(stored, shard.name, shard.box)
            assert shard.array.dtype == want.dtype
            assert shard.array.tobytes() == want.tobytes(), (path, shard.name)
            sizes[shard.name] += shard.box.size
        total = world.sum_of_numbers(np.array(list(sizes.values())))
        assert total.tolist() == [stored[name].size for name in sizes]


def main(folder, *sources):
    launch = launched()
    size = launch.size if launch else 1
    config = config_of(folder / f"own-{size}-{launch.rank if launch else 0}", size)
    with backend_of(config.backend).communicator(launch, 120.0) as world:
        task = build_task(config, report=lambda text: None)
        if not path_of(folder, size).exists():
            trainer = trainer_of(config, world, task)
            for _ in range(2):
                trainer.step()
            write(trainer.model, world, path_of(folder, size))
        for source in sources:
            check_read(config, world, task, path_of(folder, source))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
