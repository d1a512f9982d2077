"""What the cluster benchmarks share: the job they run in, and how they report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeport.backends import get_backend, join_job
from moeport.backends.base import Backend
from moeport.bench.options import CommOptions, LayerOptions
from moeport.comm.communicator import Communicator
from moeport.config.schema import Config
from moeport.errors import UserError
from moeport.launch.emulation import EMULATED
from moeport.launch.launcher import Launch, launched
from moeport.training.agreed import of_backend, of_dtype, of_options, of_start

USAGE = """bench {name} runs in the processes of a job, and this process was started by itself; start it with one of
  torchrun --nproc-per-node 2 -m moeport bench {name}
  msrun --worker_num 2 --local_worker_num 2 --join True --log_dir logs python -m moeport bench {name}
  moeport emulate --nodes 2 --ranks-per-node 2 --inter 1gbit -- bench {name}"""


def current_job(name: str) -> Launch:
    """The job that this process belongs to. Raises UserError, which names `bench NAME`, if there is none."""
    launch = launched()
    if launch is None:
        raise UserError(USAGE.format(name=name))
    return launch


@contextmanager
def joined(
    launch: Launch, command: str, config: Config, options: CommOptions | LayerOptions
) -> Iterator[tuple[Backend, Communicator]]:
    """The backend and the communicator of all ranks, once they are known to have been started alike.

    Args:
        launch: this process.
        command: such as `bench comm`.
        config: says what to compute with.
        options: all options of the command; paths of files may differ.
    """
    timeout_s = options.target.timeout
    with join_job(launch, timeout_s, config.backend) as job:
        job.agree(*of_start(command, config, of_options(options, "files", "shape.config_file")))
        backend = get_backend(config.backend)
        job.agree(of_backend(backend))
        with backend.communicator(launch, timeout_s, job) as communicator:
            communicator.agree(of_dtype(backend))
            yield backend, communicator


def machine(communicator: Communicator, backend: Backend) -> dict[str, Any]:
    """What the results were measured on, for JSON."""
    return {
        "backend": backend.name,
        "device": backend.device,
        "versions": backend.versions(),
        "ranks": communicator.size,
        "nodes": list(communicator.nodes),
        "emulated": EMULATED in os.environ,
    }


def describe_ranks(communicator: Communicator, backend: Backend) -> str:
    """Backend, device, ranks and nodes for the line above a table."""
    nodes = len(set(communicator.nodes))
    return f"{backend.name} on {backend.device}: {communicator.size} ranks on {nodes} node{'s'[: nodes > 1]}"
