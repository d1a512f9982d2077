"""Checks that a config fits the number of ranks it is started on."""

from __future__ import annotations

from moeport.config.schema import Config
from moeport.errors import UserError
from moeport.facts import BACKENDS, training_backends
from moeport.launch.training import NpuNeeds

BYTES = {"float64": 8, "float32": 4}
"""Of one number by compute type; 2 in any other."""


def check_trains(config: Config) -> None:
    """Raises UserError, which names the backends that train, for a backend that cannot."""
    name = config.backend.name
    if not BACKENDS[name].trains:
        raise UserError(f"backend.name: {name} cannot train; set backend.name to {' or '.join(training_backends())}")


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse sizes that the ranks do not divide, before anything starts.

    Args:
        config: the whole config.
        ranks: number of processes in the job.

    Raises UserError, which states the numbers.
    """
    parallelism, training = config.parallelism, config.training
    expert, data = parallelism.expert, parallelism.data
    if ranks % expert:
        raise UserError(
            f"parallelism.expert: {expert} does not divide the {ranks} ranks of this job; "
            f"expected a divisor of {ranks}, or start a multiple of {expert} ranks"
        )
    if data is not None and data * expert != ranks:
        raise UserError(
            f"parallelism.data: {data} copies of the experts on {expert} ranks each (parallelism.expert) make "
            f"{data * expert} ranks, and this job has {ranks}; expected {ranks // expert}, or leave it out"
        )
    per_node = config.comm.ranks_per_node
    if per_node is not None and ranks % per_node:
        raise UserError(
            f"comm.ranks_per_node: {per_node} does not divide the {ranks} ranks of this job; "
            f"expected a divisor of {ranks}, or leave it out"
        )
    name = config.backend.name
    if ranks > 1 and not BACKENDS[name].launcher:
        raise UserError(f"backend.name: {name} runs in one process (this job has {ranks} ranks); start it by itself")
    parts = ranks * training.gradient_accumulation
    if training.batch_size % parts:
        below = training.batch_size // parts * parts
        nearest = f"{below} or {below + parts}" if below else str(parts)
        raise UserError(
            f"training.batch_size: {training.batch_size} sequences do not divide among {ranks} ranks x "
            f"{training.gradient_accumulation} micro-batches (training.gradient_accumulation); expected a multiple of "
            f"{parts}, such as {nearest}"
        )
    nodes, size = config.model.moe.router.nodes, training.batch_size // parts
    if config.data.domains and nodes and size % nodes:
        raise UserError(
            f"model.moe.router.nodes: {nodes} nodes do not divide the {size} sequences of a micro-batch "
            f"({training.batch_size} over {parts} of them), each of which belongs to one node and its domain; expected "
            f"a divisor of {size}, or training.batch_size a multiple of {parts * nodes}"
        )


def npu_needs(config: Config, ranks: int) -> NpuNeeds | None:
    """What `moeport launch` has to know of a job on NPUs; None where `backend.device` is not npu.

    Args:
        config: one that fits the ranks.
        ranks: number of processes in the job.
    """
    if config.backend.device != "npu":
        return None
    sequences = config.training.batch_size // (ranks * config.training.gradient_accumulation)
    numbers = sequences * config.data.tokens_per_sequence * config.model.d_model
    return NpuNeeds(config.comm.timeout, numbers * BYTES.get(config.backend.dtype, 2))
