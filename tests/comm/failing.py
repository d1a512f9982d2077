"""A job that goes wrong in the way its first argument says. Run by test_failures under a launcher."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from moeport.backends import get_backend
from moeport.comm.start import check_start
from moeport.config.training import BackendConfig
from moeport.launch.launcher import launched
from tests.comm import cases

VERSIONS = {"one package": "1.2", "another": "8.3"}


def main(mode: str, name: str, folder: Path) -> None:
    launch = launched()
    if launch.rank >= 0:
        (folder / f"pid.{launch.rank}").write_text(str(os.getpid()))
    backend = get_backend(BackendConfig(name=name, device="cpu"))
    with backend.communicator(launch, 60.0) as communicator:
        if mode in WRONG:
            wrong_library(communicator, backend, WRONG[mode])
        else:
            globals()[mode](communicator, backend.ops, folder)


WRONG = {
    "exchange": ("_native_all_to_all",),
    "messages": ("_native_all_to_all", "_messages"),
    "sum": ("_all_reduce",),
}
"""Methods of a library that silently delivers zeros, where more than two ranks communicate."""


def wrong_library(world, backend, methods):
    """Rank 1 receives the zeros. Where the ranks go on, they exchange rows in groups as well."""
    for method in methods:
        setattr(type(world), method, zeros_of(getattr(type(world), method)))
    world._exchange = world._native_all_to_all
    print(f"said: {check_start(world, ['float32', 'index'], backend.value_and_grad, VERSIONS)}", flush=True)
    for case in ("all_to_all-float32", "all_to_all_backward-float64"):
        cases.run(case, world, backend)
    print("all exchanges are right", flush=True)


def zeros_of(real):
    def deliver(self, *given):
        out = real(self, *given)
        if self.size > 2 and self.rank == 1:
            if not isinstance(out, tuple):
                return out * 0
            out[1]()
            return out[0] * 0, lambda: None
        return out

    return deliver


def killed(communicator, ops, folder):
    x = ops.from_numpy(np.ones((communicator.size, 3), np.float32))
    ones = [1] * communicator.size
    for step in range(10**9):
        communicator.all_reduce(communicator.all_to_all(x, ones, ones))
        if step == 3:
            (folder / f"ready.{communicator.rank}").touch()


def mismatch(communicator, ops, folder):
    """Rank 1 sends two rows to rank 0, which expects three."""
    rows = np.eye(communicator.size, dtype=int)
    rows[1, 0] = 2
    send, receive = rows[communicator.rank].tolist(), rows[:, communicator.rank].tolist()
    if communicator.rank == 0:
        receive[1] = 3
    communicator.all_to_all(ops.from_numpy(np.ones((sum(send), 3), np.float32)), send, receive)
    print("the exchange went through", flush=True)


def absent(communicator, ops, folder):
    """Rank 1 never comes."""
    communicator._liveness._timeout_s = 8.0
    communicator.barrier()
    if communicator.rank == 1:
        time.sleep(600)
    communicator.all_gather(ops.from_numpy(np.ones(2, np.float32)))


def exception(communicator, ops, folder):
    """Rank 1 raises outside a collective."""
    communicator.barrier()
    if communicator.rank == 1:
        raise ValueError("the file is not there")
    communicator.barrier()


def disagreement(communicator, ops, folder):
    """Rank 1 names other groups."""
    ranks = list(range(communicator.size))
    communicator.group([ranks] if communicator.rank == 1 else [[rank] for rank in ranks])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
