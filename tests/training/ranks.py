"""Steps of a tiny model on the ranks of a job, to be compared with one process.

Run as a script in each process of a job: BACKEND FOLDER [DEVICE [compiled]]. The first rank writes FOLDER/CASE.npz for
every case.
"""

import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.comm.mesh import Mesh
from moeport.core.parameters import InitialWeights
from moeport.core.weights import Box
from moeport.errors import NonFiniteError, UserError
from moeport.launch.launcher import launched
from moeport.training.batches import Batches
from moeport.training.placed import place_model
from moeport.training.task import build_task
from moeport.training.trainer import Trainer
from tests.training.tiny import tiny_config

STEPS = 2
"""The second step depends on the moments of the first."""
BATCH = 8
EVALUATION_BATCH = 6
"""Sequences of a rank; the held-out text has five such batches, which neither two nor four ranks share equally."""
CAPACITY = {"capacity": {"policy": "factor", "factor": 0.8, "drop": "probability"}}


def moe(router="topk", **options):
    return {"model": {"moe": {"router": {"name": router}, **options}}}


CASES: dict[str, dict[str, Any]] = {
    "experts on all ranks": {"parallelism": {"expert": 0}},
    "experts on each rank": {},
    "two copies of the experts": {"parallelism": {"expert": -2}},
    "hierarchical": {"parallelism": {"expert": 0}, "comm": {"algorithm": "hierarchical"}},
    "node_dedup": {"parallelism": {"expert": 0}, "comm": {"algorithm": "node_dedup"}},
    "node_dedup with capacity": {
        "parallelism": {"expert": 0},
        "comm": {"algorithm": "node_dedup"},
        **moe("gshard", **CAPACITY),
    },
    "in chunks": {"parallelism": {"expert": 0}, "comm": {"chunks": 3}},
    "in chunks, recomputed": {
        "parallelism": {"expert": -2},
        "comm": {"algorithm": "node_dedup", "chunks": 2},
        "training": {"activation_checkpointing": True},
    },
    "whole copies": {"parallelism": {"expert": -2, "shard": False}},
    "micro-batches": {"parallelism": {"expert": 0}, "training": {"gradient_accumulation": 2}},
    "recomputed": {"parallelism": {"expert": -2}, "training": {"activation_checkpointing": True}},
    "float64": {"parallelism": {"expert": -2}, "backend": {"dtype": "float64"}},
    "bfloat16": {"parallelism": {"expert": -2}, "backend": {"dtype": "bfloat16"}},
    "bfloat16, micro-batches": {
        "parallelism": {"expert": 0, "shard": False},
        "training": {"gradient_accumulation": 2},
        "backend": {"dtype": "bfloat16"},
    },
    "muon": {"parallelism": {"expert": 0}, "optimizer": {"name": "muon"}},
    "muon on copies": {"parallelism": {"expert": -2}, "optimizer": {"name": "muon", "clip_norm": 0.1}},
    "muon, float64": {
        "parallelism": {"expert": -2},
        "backend": {"dtype": "float64"},
        "optimizer": {"name": "muon", "clip_norm": 0.1},
    },
    "muon, 6 experts on each rank": {"model": {"moe": {"num_experts": 6}}, "optimizer": {"name": "muon"}},
    "adafactor": {"parallelism": {"expert": -2, "shard": False}, "optimizer": {"name": "adafactor", "clip_norm": 0.1}},
    "untied": {"parallelism": {"expert": -2}, "model": {"tie_embeddings": False}},
    "balance over all ranks": {
        "parallelism": {"expert": 0},
        **moe(load_balance={"coefficient": 0.5, "scope": "global"}),
    },
    "soft": {"parallelism": {"expert": 0}, **moe("soft", allow_future_tokens=True)},
    "sub-layers": {"parallelism": {"expert": -2}, **moe("cartesian")},
    "two passes": {"parallelism": {"expert": 0}, **moe("random")},
    "experts choose": {
        "parallelism": {"expert": 0},
        "comm": {"algorithm": "node_dedup"},
        **moe("expert_choice", allow_future_tokens=True),
    },
    "rounded rows": {
        "parallelism": {"expert": 0},
        "comm": {"algorithm": "node_dedup", "chunks": 2},
        **moe(capacity={"policy": "round", "tile": 8}),
    },
    "router state": {"parallelism": {"expert": 0}, **moe("sigmoid_bias")},
    "latent attention within documents": {
        "parallelism": {"expert": 0},
        "comm": {"chunks": 2},
        "model": {
            "attention": {
                "kind": "mla",
                "num_kv_heads": None,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 4,
                "qk_rope_head_dim": 4,
                "v_head_dim": 6,
            }
        },
        "data": {"document_mask": True, "sequence_length": 96},
    },
    "estimated capacity": {
        "parallelism": {"expert": 0},
        "model": {
            "moe": {
                "router": {"name": "locmoe_plus", "locality_coefficient": 0.0},
                "capacity": {"policy": "locmoe_plus", "drop": "affinity"},
            }
        },
    },
}
"""Sections of configs; an expert of 0 stands for all ranks, one of -2 for half of them. No case has a locality loss,
which differs between one node and several.
"""
COMPILED = ("experts on all ranks", "in chunks, recomputed", "two copies of the experts", "sub-layers", "soft")
"""Cases that are compared with one process that does not compile."""
ON_MINDSPORE = (
    "experts on all ranks",
    "experts on each rank",
    "node_dedup with capacity",
    "latent attention within documents",
    "two copies of the experts",
    "whole copies",
    "muon on copies",
)
REPEATED = ("node_dedup", "in chunks", "recomputed", "muon on copies")
"""What they have, another case has too: node_dedup with a capacity, chunks with latent attention, recomputation in
chunks, Muon on copies in float64. `make test` leaves them out on torch.
"""
ON_NPU = (
    "experts on all ranks",
    "experts on each rank",
    "node_dedup with capacity",
    "in chunks, recomputed",
    "whole copies",
    "micro-batches",
    "float64",
    "router state",
    "two passes",
)


DEEP = (
    "experts on all ranks",
    "in chunks, recomputed",
    "recomputed",
    "sub-layers",
    "two passes",
    "router state",
    "node_dedup with capacity",
)
"""Cases of two layers, whose exchanges, recomputations or states follow each other; the others have one."""
FIRST_STEP_ALONE = ("experts choose", "bfloat16", "bfloat16, micro-batches")
"""Equal tokens of the text tie, and rounding breaks the tie from the second step on; so it does in bfloat16."""
TOLERANCES = {"float64": 1e-10, "bfloat16": 1e-2}
"""By a word in the name of the case; 1e-5 for all others."""
backend_of = functools.cache(get_backend)  # a process has one device of MindSpore, and sets it once


def cases_of(backend, device="cpu", size=0):
    """Names of the cases; four ranks are those of `make test`."""
    if backend == "mindspore":
        return ON_MINDSPORE
    left_out = REPEATED if size == 4 and device == "cpu" else ()
    return ON_NPU if device == "npu" else tuple(case for case in CASES if case not in left_out)


def config_of(backend, case, size, folder, device="cpu"):
    """The config of a case; with a size of 0 that of one process which computes the same."""
    sections = {name: dict(values) for name, values in CASES[case].items()}
    model = {"num_layers": 2 if case in DEEP else 1, **sections.get("model", {})}
    if size > 4:
        model["moe"] = {"num_experts": size, **model.get("moe", {})}
    sections["model"] = model
    training = {"batch_size": max(BATCH, 2 * size), "steps": STEPS + 1} | sections.pop("training", {})
    parallelism = sections.pop("parallelism", {})
    if "expert" in parallelism:
        parallelism["expert"] = {0: size, -2: size // 2}[parallelism["expert"]]
    if parallelism.get("expert", 1) == 1:
        sections.pop("comm", None)
    return tiny_config(
        folder,
        training=training,
        parallelism=parallelism,
        **sections | {"backend": {"name": backend, "device": device, "compile": False, **sections.get("backend", {})}},
    )


def one_process(config, size):
    """The config of one process in which each micro-batch is that of a rank, or with a loss over all of them the whole
    batch.
    """
    if config.model.moe.load_balance.scope == "global":
        return config
    parts = config.training.gradient_accumulation * size
    training = config.training.model_copy(update={"gradient_accumulation": parts})
    return config.model_copy(update={"training": training})


def trainer_of(config, world, task):
    """A trainer at its first step."""
    mesh = Mesh(world, config.parallelism.expert if world.size > 1 else 1)
    lm = task.model()
    params = InitialWeights(lm.parameter_specs(), config.training.seed, task.token_counts)
    algorithm = config.comm.algorithm, config.comm.chunks
    placed = place_model(config, backend_of(config.backend), lm, params, mesh, algorithm)
    return Trainer(config, placed, Batches(config.training, lm, task.train, world, task.first_token))


def run(config, world):
    """Losses, gradients and parameters of some steps, and an evaluation."""
    task = build_task(config, report=lambda text: None)
    trainer = trainer_of(config, world, task)
    if config.data.document_mask:
        check_documents(trainer.batches, world)
    model = trainer.model
    found, step = {}, model.step

    def observed(learning_rate, norm):
        if "loss.0" not in found:
            found.update({f"gradient.{name}": value for name, value in model.gradients().items()})
        step(learning_rate, norm)

    model.step = observed
    if config.backend.name == "mindspore" and hasattr(model, "copies"):
        assert model.copies.divides == (config.parallelism.shard is not False)
    for number in range(STEPS):
        metrics = trainer.step()
        found[f"loss.{number}"] = np.array([metrics.loss, metrics.total_loss, metrics.grad_norm, metrics.drop_rate])
        found[f"load.{number}"] = np.array(metrics.expert_load)
    found["exchanged"] = np.array([metrics.exchanged_rows_per_layer, metrics.exchanged_bytes_per_layer])
    state, parameters = model.optimizer_state(), model.parameters()
    found |= {f"parameter.{name}": value for name, value in parameters.items()}
    found |= {f"state.{name}": value for name, value in state.items()}
    if config.backend.name == "torch":
        check_boxes(model)
    check_shards(model.shards(), parameters, world)
    check_shards(model.optimizer_shards(), state, world)
    evaluation = task.evaluate(world, model, EVALUATION_BATCH)
    found["evaluation"] = np.array([evaluation.loss])
    model.load_optimizer_state(state, STEPS)
    model.load_parameters(parameters)
    found["again"] = np.array([trainer.step().loss])
    return found


def check_documents(batches, world):
    """Documents end within sequences that are trained on: else a mask that is ignored would pass."""
    documents = [batch.document_BS for number in range(STEPS) for batch in batches.of_step(number)]
    ends = sum(np.sum(document_BS != document_BS[:, :1]) for document_BS in documents)
    assert world.sum_of_numbers(np.array([float(ends)]))[0] > 0


def check_shards(shards, whole, world):
    """What the ranks are to write is every entry of every array once, with the values of the whole array."""
    values, counts = ({name: np.zeros(x.shape) for name, x in whole.items()} for _ in range(2))
    for shard in shards:
        assert shard.whole == whole[shard.name].shape
        assert shard.array.dtype == whole[shard.name].dtype
        values[shard.name][shard.box.slices] += shard.array
        counts[shard.name][shard.box.slices] += 1
    if world.size > 1:
        assert sum(map(np.sum, counts.values())) <= 0.75 * sum(x.size for x in whole.values())
    flat = [np.concatenate([arrays[name].ravel() for name in whole]) for arrays in (values, counts, whole)]
    assert np.all(world.sum_of_numbers(flat[1]) == 1)
    np.testing.assert_array_equal(world.sum_of_numbers(flat[0]), flat[2])


def check_boxes(model):
    """What a rank holds by our arithmetic is what DTensor holds there."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for name, x in model.module.state_dict().items():
        part = model.mesh.box(model.specs[name])
        if isinstance(x, DTensor):
            shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
            part = Box(tuple(np.add(part.start, offset)), tuple(shape))
        found = model.held[name].box
        assert found == part or found.size == part.size == 0, (name, found, part)


def check_refusal(config, world):
    """If the loss of the last rank alone is infinite, every rank learns it, and nothing changes from that step on."""
    trainer = trainer_of(config, world, build_task(config, report=lambda text: None))
    model = trainer.model
    assert not trainer.waits
    trainer.advance()
    before = model.parameters() | model.optimizer_state()
    if world.rank == world.size - 1:
        forward = model.module.forward

        def infinite(batch):
            terms = forward(batch)
            return terms._replace(loss=terms.loss + math.inf)  # its gradients are finite

        model.module.forward = infinite
    trainer.advance()
    trainer.advance()
    steps = []
    try:
        for metrics in trainer.collect():
            steps.append(metrics.step)
    except NonFiniteError as error:
        steps.append(str(error).partition(",")[0])
    assert steps == [1, "step 2: loss or gradient norm is not finite (loss inf"], steps
    for name, value in (model.parameters() | model.optimizer_state()).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def check_whole(config, world):
    """Adafactor refuses matrices that are divided, and says what to set."""
    divided = config.model_copy(update={"parallelism": config.parallelism.model_copy(update={"shard": True})})
    message = ""
    try:
        trainer_of(divided, world, build_task(divided, report=lambda text: None))
    except UserError as error:
        message = str(error)
    assert message.startswith("parallelism.shard: divides embedding.weight among ranks"), message


def faults_of(case, found, want):
    """A line for each value in which ranks and one process differ."""
    assert found.keys() == want.keys()
    tolerance, faults = next((value for word, value in TOLERANCES.items() if word in case), 1e-5), []
    for name in compared(case, found):
        scale = np.abs(want[name]).max()
        error = np.abs(found[name] - want[name]).max() / (scale or 1.0)
        if not error <= tolerance * (10 if name.startswith(("parameter.", "state.")) else 1):
            faults.append(f"{case}: {name} differs by {error:.1e} of {scale:.1e}")
    return faults


def compared(case, found):
    """Names of what ranks and one process must have alike."""
    if case in FIRST_STEP_ALONE:
        return [name for name in found if name.startswith("gradient.") or name.endswith(".0")]
    return [name for name in found if name != "exchanged"]


def compiled(config):
    """The graphs are those that the compiler is given, but it only runs them: compiling takes minutes."""
    import moeport.backends.torch.compiling

    moeport.backends.torch.compiling.COMPILER = "aot_eager"
    return config.model_copy(update={"backend": config.backend.model_copy(update={"compile": True})})


def main(name, folder, device="cpu", compiles=""):
    launch = launched()
    own = folder / str(launch.rank)  # each rank writes its text, and none reads what another has half written
    backend = backend_of(config_of(name, "experts on each rank", 1, own, device).backend)
    if name == "mindspore":
        from moeport.backends.mindspore import division

        division.BUCKET = 3000  # several buckets, some of which end within a parameter
    with backend.communicator(launch, 120.0) as world:
        if world.size == 4:
            world._locate((0, 0, 1, 1))
        for case in COMPILED if compiles else cases_of(name, device, world.size):
            config = config_of(name, case, world.size, own, device)
            found = run(compiled(config) if compiles else config, world)
            if world.rank == 0:
                np.savez(folder / f"{case}.npz", **found)
        if (name, device, compiles) == ("torch", "cpu", ""):
            check_refusal(config_of(name, "micro-batches", world.size, own), world)
            check_whole(config_of(name, "adafactor", world.size, own), world)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
