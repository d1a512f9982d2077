"""Refuses a run that this machine's memory cannot hold, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moeport.config.schema import Config
from moeport.core.parameters import ParameterSpec
from moeport.errors import UserError
from moeport.launch.machine import memory_bytes
from moeport.model.memory import Memory, ModelSizes, fits, gib, memory_text
from moeport.model.memory import memory as memory_of

BYTES = 4
"""Of a parameter on the host, whatever the compute type."""


@dataclass(frozen=True)
class Room:
    """Where a rank computes."""

    ranks_here: int = 1
    """Number of ranks on this machine."""
    on_cpu: bool = True
    """Whether the processor computes, in the machine's memory."""
    device: float | None = None
    """Bytes of the accelerator of a rank; None: not known, or none."""

    def holds(self, memory: Memory) -> bool:
        """Whether what a rank needs fits, as far as it is known."""
        on_device = self.on_cpu or self.device is None or memory.total <= self.device
        return on_device and self.ranks_here * memory.on_host(self.on_cpu) <= physical_memory()


def check_memory(config: Config, specs: Sequence[ParameterSpec], micro_batch: int, ranks: int, room: Room) -> None:
    """Refuse what cannot fit even if nothing else needs memory.

    Args:
        config: the whole config.
        specs: the whole model's parameters.
        micro_batch: sequences or images of one micro-batch on one rank.
        ranks: number of ranks.
        room: where a rank computes.

    Raises UserError: parameters, gradients and moments, or the outputs of the blocks for one micro-batch, exceed the
        memory of the accelerator or of the machine.
    """
    memory, place = (physical_memory(), "this machine") if room.device is None else (room.device, "the accelerator")
    sharing = room.ranks_here if room.on_cpu else 1
    held = sharing * rank_memory(config, specs, micro_batch, ranks).held
    if held > memory:
        largest = max(specs, key=lambda spec: prod(spec.shape))
        owners = "its parameters" if sharing == 1 else f"its parameters on {sharing} ranks"
        raise UserError(
            f"model: {owners}, with gradients and moments, need {gib(held)} and {place} has {gib(memory)}; the "
            f"largest, {largest.name}, is {' x '.join(map(str, largest.shape))}. Choose smaller sizes, or divide the "
            "model among ranks on more machines (parallelism.shard, parallelism.expert)"
        )
    model, length = config.model, config.data.tokens_per_sequence
    outputs = BYTES * model.num_layers * micro_batch * length * model.d_model
    if outputs > memory:
        raise UserError(
            f"training.batch_size: the outputs of {model.num_layers} blocks for a micro-batch of {micro_batch:,} x "
            f"{length:,} tokens need {gib(outputs)} and {place} has {gib(memory)}; raise "
            "training.gradient_accumulation, or choose smaller sizes"
        )


def rank_memory(config: Config, specs: Sequence[ParameterSpec], micro_batch: int, ranks: int) -> Memory:
    """What a rank needs of a model with these parameters, see `check_memory`."""
    expert = config.parallelism.expert if ranks > 1 else 1
    tokens = micro_batch * config.data.tokens_per_sequence
    return memory_of(config, ModelSizes.of_specs(config, specs), ranks, expert, tokens)


def memory_line(memory: Memory, room: Room) -> str:
    """What a rank will need, and whether that fits this machine and its accelerator."""
    host = room.ranks_here * memory.on_host(room.on_cpu)
    ranks = "1 rank" if room.ranks_here == 1 else f"{room.ranks_here} ranks"
    said = [f"{memory_text(memory)} per rank"]
    if not room.on_cpu:
        has = float("inf") if room.device is None else room.device
        said.append(fits(memory.total, has, "device"))
    return "; ".join([*said, f"{ranks} on this host: {fits(host, physical_memory(), 'host')}"])


def physical_memory() -> float:
    """Bytes of main memory of this machine, or the limit of its container; infinite where the system does not say."""
    memory = memory_bytes()
    return float("inf") if memory is None else memory


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
