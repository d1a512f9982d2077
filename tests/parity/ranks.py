"""Recordings of the tiny config by the ranks of a job, sound and faulty.

Run as a script in each process of a job: BACKEND FOLDER. The first rank writes the bundle FOLDER/CASE for every case of
`CASES`, and needs the config FOLDER/config.yaml and the bundle FOLDER/alone of one process.
"""

import dataclasses
import functools
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from moeport.backends import get_backend
from moeport.comm.exchange import FlatExchange, flat
from moeport.comm.mesh import Mesh
from moeport.data import Sampler
from moeport.launch.launcher import launched
from moeport.parity.bundle import load_bundle, save_bundle
from moeport.parity.record import record
from moeport.parity.subject import Size, Variant, subject_on, variant_config


def size_of(ranks):
    return Size(sequences=2 * ranks, tokens=16, steps=2, micro_batches=ranks)


@contextmanager
def row_lost_on_the_way(world):
    """The last row that rank 1 receives is zero."""
    real = flat.exchange_rows

    def lossy(ops, communicator, x_RD, counts_E, experts):
        def with_a_hole(rows, counts):
            hole = ops.concat([rows[:-1], ops.zeros((1, rows.shape[1]), ops.dtype(rows))], axis=0)
            return (yield from experts(hole if world.rank == 1 else rows, counts))

        return real(ops, communicator, x_RD, counts_E, with_a_hole)

    with mock.patch.object(flat, "exchange_rows", lossy):
        yield


@contextmanager
def assignment_to_another_expert(world):
    """The first assignment of rank 0 goes to the expert after its own."""
    real = FlatExchange.exchange

    def misled(self, ops, x_TD, routing, experts):
        expert_N = routing.expert_N.clone()
        expert_N[0] = (expert_N[0] + (world.rank == 0)) % self.num_experts
        return real(self, ops, x_TD, dataclasses.replace(routing, expert_N=expert_N), experts)

    with mock.patch.object(FlatExchange, "exchange", misled):
        yield


@contextmanager
def mean_of_the_experts_gradients(world):
    """Experts' gradients are divided by the number of ranks once more."""
    from moeport.backends.torch.optimizer import AdamW

    real = AdamW.gradient_norm

    def norm(self):
        for name, p in self.parameters.items():
            if ".experts." in name:
                p.grad.div_(world.size)
        return real(self)

    with mock.patch.object(AdamW, "gradient_norm", norm):
        yield


@contextmanager
def same_tokens_on_all_ranks(world):
    real = Sampler.rank_indices
    with mock.patch.object(Sampler, "rank_indices", lambda self, step, rank, size: real(self, step, 0, size)):
        yield


SHARED = "parallelism.expert={ranks}"
CASES = {
    "flat": SHARED,
    "two copies": "parallelism.expert={half}",
    "hierarchical": f"{SHARED} comm.algorithm=hierarchical",
    "node_dedup": f"{SHARED} comm.algorithm=node_dedup",
    "recomputed": f"{SHARED} training.activation_checkpointing=true",
    "bfloat16": SHARED,
    "bfloat16 replayed": SHARED,
}
"""Overrides of variants."""
FAULTS = {
    "row lost": row_lost_on_the_way,
    "wrong expert": assignment_to_another_expert,
    "gradients averaged": mean_of_the_experts_gradients,
    "same tokens": same_tokens_on_all_ranks,
}
"""Of the case `flat`."""
FORWARD = ("row lost", "wrong expert", "same tokens")
"""Cases that are not trained."""
backend_of = functools.cache(get_backend)  # a process has one device of MindSpore, and sets it once


def main(name, folder):
    alone, size = load_bundle(folder / "alone"), size_of(launched().size)

    def of(spec):
        config = variant_config(folder / "config.yaml", Variant.parse(spec), [], size, size.micro_batches)
        return config, backend_of(config.backend)

    with of(f"{name}-cpu")[1].communicator(launched()) as world:
        if world.size == 4:
            world._locate((0, 0, 1, 1))
        for case in [*CASES, *FAULTS] if name == "torch" else ["flat"]:
            overrides = CASES.get(case, SHARED).format(ranks=world.size, half=world.size // 2)
            dtype = ":bf16" if case.startswith("bfloat16") else ""
            config, backend = of(f"{name}-cpu{dtype} {overrides}")
            mesh = Mesh(world, config.parallelism.expert)
            subject = subject_on(case, config, backend, mesh, None, lambda text: None)
            steps = 0 if case in FORWARD else 1 if case.endswith("replayed") else size.steps
            with FAULTS.get(case, nullcontext)(world):
                recording = record(subject, steps=steps, replay=alone if "replayed" in case else None)
            if world.rank == 0:
                save_bundle(recording, folder / case)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
