"""Communicators in MindSpore: MCCL on the CPU, HCCL on Ascend. HCCL has not been run on hardware.

What works in MCCL of MindSpore 2.10, as tested: `AllReduce` of float32 sums, and point-to-point messages of any type.
It has no all-to-all, no reduce-scatter and no maximum. `AllGather` and `Broadcast` only support the group of all ranks,
and round float64 and int64 to float32. A message that nobody receives is delivered to the next collective, and one of
the wrong length leaves the rest of the array unchanged, both without an error.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication
from mindspore import ops as msops
from mindspore.mint import distributed
from typing_extensions import override

from moeport.backends.mindspore import private
from moeport.backends.mindspore.device import is_on_cpu
from moeport.comm.communicator import Communicator, Pending, Transfer
from moeport.comm.job import Job
from moeport.comm.rendezvous import meeting_of, serve
from moeport.core.ops import Ops
from moeport.errors import BackendUnavailableError
from moeport.launch.launcher import Launch

LOWEST_PRIORITY = 19
"""Of a thread, on Linux."""


def start(ops: Ops, launch: Launch, timeout_s: float, job: Job | None) -> MindSporeCommunicator:
    """The communicator of all ranks of the job. In msrun's scheduler process, serves the job and exits."""
    if launch.launcher != "msrun":
        raise BackendUnavailableError(
            f"backend.name: mindspore communicates under msrun (started by {launch.launcher})"
        )
    if launch.is_scheduler:
        if serve(launch, timeout_s):
            communication.init()
        sys.exit()
    joined = job or Job(meeting_of(launch, timeout_s))
    with joined.starting("mindspore.communication.init"):
        communication.init()
    atexit.register(_let_receivers_finish, launch.rank)
    kind = MCCLCommunicator if is_on_cpu() else HCCLCommunicator
    communicator = kind(ops, tuple(range(launch.size)), launch.rank, communication.GlobalComm.WORLD_COMM_GROUP)
    communicator.join(joined, owned=job is None)
    return communicator


def _let_receivers_finish(rank: int) -> None:
    """Called at exit, before MindSpore leaves its cluster, where it may crash after all work is done.

    MindSpore 2.10's main thread waits there for an answer of the scheduler, ends the threads of a first connection and
    frees a second one, from which the thread that has received the answer still tries to read: a segmentation fault if
    that thread is the slower one, as happens on busy machines. Here all of them share a core, on which the receiving
    threads come first: the main thread preempts nobody as it wakes, and the sending threads, for whose end it waits,
    have the lowest priority.
    """
    if sys.platform != "linux":
        return
    cores = sorted(os.sched_getaffinity(0))
    core = {cores[rank % len(cores)]}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread may have ended
            name = (task / "comm").read_text()
            if "_EVENT_LOOP" in name:
                os.sched_setaffinity(int(task.name), core)
            if name.startswith("SEND"):
                os.setpriority(os.PRIO_PROCESS, int(task.name), LOWEST_PRIORITY)
    os.sched_setaffinity(0, core)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class MindSporeCommunicator(Communicator):
    """A communication group of MindSpore."""

    needs_link = True

    def __init__(self, ops: Ops, ranks: tuple[int, ...], global_rank: int, name: str):
        super().__init__(ops, ranks, global_rank)
        self.name = name
        """MindSpore's name of the group."""

    def _group(self, ranks: tuple[int, ...]) -> MindSporeCommunicator:
        name = "moeport-" + "-".join(map(str, ranks))
        if name not in _created:
            communication.create_group(name, list(ranks))
            _created.add(name)
        return type(self)(self.ops, ranks, self.ranks[self.rank], name)

    def _differentiable(self, transfer: Transfer, x: Tensor) -> Pending:
        if self.link is None or not x.is_floating_point():
            out = _Exchange.apply(x, transfer)
        else:
            out, self.link = _LinkedExchange.apply(x, self.link, transfer)
        return lambda: out


_created: set[str] = set()


class MCCLCommunicator(MindSporeCommunicator):
    """MCCL: sums of float32 by its own kernel, everything else by pairwise messages.

    Every method waits for its result, since MindSpore reports an error at a later operation.
    """

    library = "MCCL"
    checks_splits = True

    @override
    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        """MCCL only sums float32 and float16, so the rest is gathered and reduced in rank order."""
        if op == "sum" and x.dtype == ms.float32:
            return Tensor(msops.AllReduce(group=self.name)(msops.stop_gradient(x)).asnumpy())
        gathered = self._gather(x.asnumpy())
        return Tensor(np.max(gathered, axis=0) if op == "max" else np.sum(gathered, axis=0, dtype=gathered[0].dtype))

    def _all_gather(self, x: Tensor) -> Tensor:
        return Tensor(np.stack(self._gather(x.asnumpy())))

    def _gather(self, x: np.ndarray) -> list[np.ndarray]:
        return self._messages([x] * self.size, [x.shape] * self.size)

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        host = x.asnumpy()
        nothing = host.reshape(-1)[:0]
        out = [host if self.rank == source else nothing] * self.size
        shapes = [host.shape if rank == source else (0,) for rank in range(self.size)]
        return Tensor(self._messages(out, shapes)[source])

    def _barrier(self) -> None:
        msops.AllReduce(group=self.name)(Tensor(np.zeros(1, np.float32))).asnumpy()

    def _all_to_all(self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
        host = x.asnumpy()
        pieces = np.split(host, np.cumsum(send)[:-1])
        return Tensor(np.concatenate(self._messages(pieces, [(rows, *host.shape[1:]) for rows in receive])))

    def _messages(self, pieces: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Send a piece to each rank and receive one of a given shape from each; an empty array is not sent.

        In round k, pairs of ranks whose sum is k modulo the size exchange messages, and the lower rank sends first. So
        no cycle of ranks can wait for each other, whether or not a send waits for its receiver.
        """
        received = [np.zeros(shape, piece.dtype) for shape, piece in zip(shapes, pieces, strict=True)]
        received[self.rank] = pieces[self.rank].copy()
        for k in range(self.size):
            peer = (k - self.rank) % self.size
            if peer > self.rank:
                self._send(pieces[peer], peer)
            if peer != self.rank:
                received[peer] = self._receive(received[peer], peer)
            if peer < self.rank:
                self._send(pieces[peer], peer)
        return received

    def _send(self, x: np.ndarray, peer: int) -> None:
        if x.size:
            private.send(Tensor(x.reshape(-1)), peer, self.name)

    def _receive(self, x: np.ndarray, peer: int) -> np.ndarray:
        if not x.size:
            return x
        out = Tensor(x.reshape(-1))
        private.receive(out, peer, self.name)
        return out.asnumpy().reshape(x.shape)


class HCCLCommunicator(MindSporeCommunicator):
    """HCCL, which has a kernel for every collective. Not run on hardware."""

    library = "HCCL"
    checks_splits = False

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        kind = msops.ReduceOp.MAX if op == "max" else msops.ReduceOp.SUM
        return msops.AllReduce(kind, self.name)(msops.stop_gradient(x))

    def _all_gather(self, x: Tensor) -> Tensor:
        flat = msops.AllGather(self.name)(msops.reshape(msops.stop_gradient(x), (-1,)))
        return msops.reshape(flat, (self.size, *x.shape))

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        return msops.Broadcast(source, self.name)((msops.stop_gradient(x),))[0]

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        return msops.ReduceScatter(group=self.name)(msops.stop_gradient(x))

    def _barrier(self) -> None:
        self._all_reduce(Tensor(np.zeros(1, np.float32)), "sum").asnumpy()

    def _all_to_all(self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
        out = msops.zeros((sum(receive), *x.shape[1:]), x.dtype)
        distributed.all_to_all_single(out, x, list(receive), list(send), self.name)
        return out


class _Exchange(private.Function):
    """An exchange whose gradient is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.back.run(gradient), None


class _LinkedExchange(private.Function):
    """An exchange that also passes a link through; see `Communicator.link`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Tensor, transfer: Transfer) -> tuple[Tensor, Tensor]:
        ctx.transfer = transfer
        return transfer.run(x), link + 0.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, link: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.transfer.back.run(gradient), link, None
