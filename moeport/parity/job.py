"""Variants on several ranks: what each rank does, and how the ranks are started on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moeport.backends import get_backend, join_job
from moeport.comm.agreement import Topic
from moeport.comm.communicator import Communicator
from moeport.comm.excuse import excused
from moeport.comm.mesh import Mesh
from moeport.errors import RunError, UserError
from moeport.facts import BACKENDS
from moeport.launch.launcher import launched, node_processes
from moeport.launch.local import free_port, local_job
from moeport.parity.bundle import MANIFEST_FILE, load_bundle, refuse_existing, save_bundle
from moeport.parity.options import BundleOptions
from moeport.parity.record import record
from moeport.parity.recording import Recording, kept_kinds
from moeport.parity.subject import Size, Variant, checkpoint_path, subject_on, variant_config
from moeport.processes import ending_of
from moeport.training.agreed import SAME_FILES, of_backend, of_dtype, of_file, of_kernels, of_options, of_start
from moeport.training.checkpoint import META_FILE
from moeport.training.prepare import check_communication

EXCERPT = 3000
"""Number of characters shown of a failed rank's output."""


@dataclass(frozen=True)
class Job:
    """A variant to be recorded by ranks that are other processes.

    Takes the arguments of `build_subject`.
    """

    name: str
    file: Path | None
    overrides: Sequence[str]
    size: Size
    checkpoint: Path | None = None

    def record(self, *, steps: int, replay: Recording | None = None) -> Recording:
        """Record it as `moeport.parity.record.record` does, keeping everything."""
        with tempfile.TemporaryDirectory() as folder:
            bundle, routing = Path(folder, "bundle"), None
            if replay:
                routing = Path(folder, "routing")
                decisions = {name: t for name, t in replay.tensors.items() if t.kind == "decision"}
                save_bundle(replace(replay, tensors=decisions), routing)
            self.write(bundle, steps, BundleOptions(routing, ["ALL=full"]))
            return load_bundle(bundle)

    def write(self, output: Path, steps: int, options: BundleOptions) -> None:
        """Start `moeport parity record` on all ranks and wait for its bundle.

        Args:
            output: folder of the bundle.
            steps: optimiser steps of the trajectory.
            options: what goes into the bundle.

        Raises UserError, before anything starts, for sizes that do not divide and kinds that do not exist, and RunError
        with the output of the first rank that failed.
        """
        variant, size = Variant.parse(self.name), self.size
        kept_kinds(options.keep or ())
        refuse_existing(output, options.overwrite)
        variant_config(self.file, variant, self.overrides, size, variant.ranks)
        flags: dict[str, Sequence[str]] = {
            "--variant": [self.name],
            "--output": [str(output)],
            "--set": list(self.overrides),
            "--sequences": [str(size.sequences)],
            "--tokens": [str(size.tokens)],
            "--steps": [str(steps)],
            "--micro-batches": [str(size.micro_batches)],
            "--checkpoint": [str(self.checkpoint)] if self.checkpoint else [],
            "--replay": [str(options.replay)] if options.replay else [],
            "--keep": options.keep or [],
            "--sample-size": [str(options.sample_size)],
        }
        command = ["parity", "record", *([str(self.file)] if self.file else [])]
        command += [word for flag, values in flags.items() for value in values for word in (flag, value)]
        command += ["--overwrite"] if options.overwrite else []
        _run(self.name, variant, command)


def record_bundle(job: Job, output: Path, options: BundleOptions, report: Callable[[str], None]) -> bool:
    """Record a variant as one bundle, in this process or in all processes of the job that a launcher started.

    Args:
        job: the variant, with one rank or with as many as the launcher started.
        output: folder of the bundle.
        options: what goes into the bundle.
        report: is given a sentence on what is being done.

    Returns: whether this process wrote the bundle, as the first rank does.
    """
    spec, size, keep = job.name, job.size, kept_kinds(options.keep or ())
    launch, variant = launched(), Variant.parse(spec)
    ranks = launch.size if launch else 1
    with excused():
        if launch is None or launch.rank <= 0:
            refuse_existing(output, options.overwrite)
        if launch and variant.ranks not in (1, ranks):
            raise UserError(
                f"variant {spec!r} has {variant.ranks} ranks, but this job has {ranks}; leave out the ranks"
            )
        config = variant_config(job.file, variant, job.overrides, size, ranks)
        if launch and config.comm.ranks_per_node:
            launch = launch.on_nodes_of(config.comm.ranks_per_node)
        routing = load_bundle(options.replay) if options.replay else None
    asked = of_options(size) | {"--variant": spec, "--keep": options.keep, "--sample-size": options.sample_size}
    with join_job(launch, config.comm.timeout, config.backend) as ranks_of_job:
        ranks_of_job.agree(*of_start("parity record", config, asked), _of_inputs(job.checkpoint, options.replay))
        backend = get_backend(config.backend)
        ranks_of_job.agree(of_backend(backend))
        with backend.communicator(launch, config.comm.timeout, ranks_of_job) as world:
            world.agree(of_dtype(backend), of_kernels(backend))
            mesh = Mesh(world, config.parallelism.expert if ranks > 1 else 1)
            if backend.trains:
                check_communication(backend, mesh, report)
            subject = subject_on(_named(spec, world), config, backend, mesh, job.checkpoint, report)
            recording = record(subject, steps=size.steps, keep=keep, replay=routing, sample_size=options.sample_size)
            is_first = world.rank == 0
            if is_first:
                save_bundle(recording, output, overwrite=options.overwrite)
    return is_first


def _of_inputs(checkpoint: Path | None, replay: Path | None) -> Topic:
    """What is read besides the data. Checkpoints and bundles list their files' digests in a file of their own."""
    listed = {"the checkpoint": checkpoint and checkpoint_path(checkpoint) / META_FILE}
    listed["the bundle to replay"] = replay and replay / MANIFEST_FILE
    return Topic(SAME_FILES, {name: of_file(file) for name, file in listed.items()})


def _named(spec: str, world: Communicator) -> str:
    """The variant's name with its ranks."""
    if world.size == 1:
        return spec
    target, *overrides = spec.split()
    nodes = len(set(world.nodes))
    ranks = f"{nodes}x{world.size // nodes}" if nodes > 1 else str(world.size)
    return " ".join([f"{target.partition('@')[0]}@{ranks}", *overrides])


def _run(name: str, variant: Variant, command: Sequence[str]) -> None:
    """Run a moeport command on the ranks of a variant, all on this machine."""
    launcher = BACKENDS[variant.backend].launcher
    if launcher is None:
        raise UserError(f"variant {name!r}: {variant.backend} runs in one process; leave out @{variant.ranks}")
    if launcher == "msrun" and variant.nodes > 1:
        raise UserError(f"variant {name!r}: msrun puts all ranks of a machine on one node; expected @{variant.ranks}")
    processes = node_processes(launcher, variant.nodes, variant.ranks_per_node, "127.0.0.1", command, free_port())
    with tempfile.TemporaryDirectory() as folder:
        with local_job(processes, Path(folder), {"OMP_NUM_THREADS": "1"}) as job:
            failed = job.wait()
        if failed is not None:
            said = job.outputs[failed].read_text(errors="replace").strip()[-EXCERPT:]
            raise RunError(f"{name}: a rank ended with {ending_of(job.processes[failed].returncode)}:\n{said}")
