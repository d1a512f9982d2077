"""The lines that a run prints before its first step."""

from __future__ import annotations

from collections.abc import Iterator

from moeport.config import step_ranges
from moeport.model.rope_bases import bases_of
from moeport.training.prepare import PreparedRun


def announcement(run: PreparedRun) -> Iterator[str]:
    """The lines, in order."""
    counts = run.trainer.shapes.parameter_counts()
    yield f"device      {run.backend.device}, {run.backend.dtype}"
    if threads := run.backend.threads():
        yield f"threads     {threads}"
    if run.mesh.world.size > 1:
        yield f"ranks       {_ranks(run)}"
    yield run.task.describe()
    yield f"model       {counts.total:,} parameters, {counts.active:,} active per token"
    steps, tokens = run.config.training.steps, run.trainer.tokens_per_step
    yield f"training    {steps:,} steps of {tokens:,} tokens in {run.dir}"
    yield from _skipped(run)
    bases = bases_of(run.config.model)
    if len(set(bases)) > 1:
        yield f"rope bases  {' '.join(f'{base:g}' for base in bases)}"
    if run.checkpoint:
        yield f"resuming    after step {run.start_step:,} from {run.checkpoint.path}"
    elif run.origin:
        yield f"starting    with the weights of {run.origin['checkpoint']}"
        for key, (before, now) in run.origin["changed"].items():
            yield f"changed     {key}: {before} -> {now}"


def _skipped(run: PreparedRun) -> Iterator[str]:
    training = run.config.training
    ahead = [(max(first, run.start_step + 1), last) for first, last in training.skipped if last > run.start_step]
    if within := step_ranges.up_to(ahead, training.steps):
        yield f"skipping    steps {step_ranges.shown(within)}, as training.skip_steps says"
    if beyond := [(max(first, training.steps + 1), last) for first, last in ahead if last > training.steps]:
        steps = step_ranges.shown(beyond)
        yield f"training.skip_steps: {steps} has no effect, since the run ends after step {training.steps}"


def _ranks(run: PreparedRun) -> str:
    world, experts, copies = run.mesh.world, run.mesh.experts, run.mesh.copies
    nodes = len(set(world.nodes))
    text = f"{world.size} on {nodes} node{'s'[: nodes > 1]}"
    if experts.size == 1:
        return f"{text}, each with all experts"
    several = f"{copies.size} copies of the experts" if copies.size > 1 else "the experts"
    comm = run.config.comm
    chunks = "" if comm.chunks == 1 else f" in chunks: {comm.chunks}"
    return f"{text}: {several} over {experts.size} ranks each, all-to-all {comm.algorithm}{chunks}"
