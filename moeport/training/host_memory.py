"""Refuses a run that this machine's memory cannot hold, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

from moeport.config.schema import Config
from moeport.core.parameters import ParameterSpec
from moeport.errors import UserError
from moeport.facts import BACKENDS

BYTES = 4
"""Of a parameter on the host, whatever the compute type."""


def check_memory(
    config: Config, specs: Sequence[ParameterSpec], micro_batch: int, ranks: int = 1, ranks_here: int = 1
) -> None:
    """Refuse what cannot fit even if nothing else needs memory.

    Args:
        config: the whole config.
        specs: the whole model's parameters.
        micro_batch: sequences or images of one micro-batch on one rank.
        ranks: number of ranks.
        ranks_here: how many of them hold their parameters in this machine's memory.

    Raises UserError: the parameters, or the outputs of the blocks for one micro-batch, exceed the machine's memory.
    """
    memory = physical_memory()
    parameters = ranks_here * rank_parameter_bytes(config, specs, ranks)
    if parameters > memory:
        largest = max(specs, key=lambda spec: prod(spec.shape))
        owners = "its parameters" if ranks_here == 1 else f"its parameters on {ranks_here} ranks"
        raise UserError(
            f"model: {owners} need {gib(parameters)} and this machine has {gib(memory)}; the largest, "
            f"{largest.name}, is {' x '.join(map(str, largest.shape))}. Choose smaller sizes"
        )
    model, length = config.model, config.data.tokens_per_sequence
    outputs = BYTES * model.num_layers * micro_batch * length * model.d_model
    if outputs > memory:
        raise UserError(
            f"training.batch_size: the outputs of {model.num_layers} blocks for a micro-batch of {micro_batch:,} x "
            f"{length:,} tokens need {gib(outputs)} and this machine has {gib(memory)}; raise "
            "training.gradient_accumulation, or choose smaller sizes"
        )


def rank_parameter_bytes(config: Config, specs: Sequence[ParameterSpec], ranks: int) -> float:
    """Bytes of the parameters that a rank holds: of experts its part, and of everything a part where it is divided."""
    sharded = BACKENDS[config.backend.name].shards and config.parallelism.shard is not False
    expert = config.parallelism.expert if ranks > 1 else 1
    return sum(BYTES * prod(spec.shape) / (ranks if sharded else expert if spec.is_expert else 1) for spec in specs)


def physical_memory() -> float:
    """Bytes of main memory of this machine; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def available_memory() -> float:
    """Bytes of main memory that are free, within the limit of the container; half of all where it is not known."""
    free = physical_memory() / 2
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024.0 * int(line.split()[1])
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.1f} GiB"
