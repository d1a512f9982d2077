"""Communicators over torch.distributed, by the library that it prefers for the device.

That is gloo on the CPU, NCCL on CUDA and HCCL on Ascend. Only gloo has been run: NCCL and HCCL have not been run on
hardware. HCCL's calls were run through the real front end of torch_npu, with gloo in its place. The collectives of NCCL
and HCCL return before the device has completed them, so a process that waits forever is detected at the next call that
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.rendezvous import meeting_of, store
from moeport.comm.communicator import Communicator, Pending, Transfer
from moeport.comm.job import Job
from moeport.errors import BackendUnavailableError
from moeport.launch.launcher import Launch


def start(ops: TorchOps, launch: Launch, timeout_s: float, job: Job | None) -> TorchCommunicator:
    """The communicator of all ranks of the job, on the device of `ops`."""
    if launch.launcher == "msrun":
        raise BackendUnavailableError("backend.name: torch communicates under torchrun, srun or mpirun (got msrun)")
    if ops.device.type != "cpu":
        # srun --gpus-per-task shows each process only its own device
        torch.accelerator.set_device_index(launch.local_rank % torch.accelerator.device_count())
    joined = job or Job(meeting_of(launch, timeout_s))
    with joined.starting("init_process_group"):
        dist.init_process_group(
            dist.get_default_backend_for_device(ops.device),
            store=store(launch, timeout_s),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(seconds=2 * timeout_s),  # moeport's own timeout comes first and says more
        )
    communicator = TorchCommunicator(ops, tuple(range(launch.size)), launch.rank, dist.group.WORLD)
    communicator.join(joined, owned=job is None)
    return communicator


def communication_libraries() -> dict[str, str | None]:
    """Libraries of this PyTorch build, each with its version where it tells one, or None where it lacks it."""
    there = dist.is_available()
    nccl = there and dist.is_nccl_available()
    return {
        "gloo": "built in" if there and dist.is_gloo_available() else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "mpi": "built in" if there and dist.is_mpi_available() else None,
        "hccl": "by torch_npu" if there and hasattr(torch, "npu") else None,
    }


class TorchCommunicator(Communicator):
    """A process group."""

    ops: TorchOps

    def __init__(self, ops: TorchOps, ranks: tuple[int, ...], global_rank: int, process_group: Any):
        super().__init__(ops, ranks, global_rank)
        self.process_group = process_group
        self.library = dist.get_backend(process_group)
        self.checks_splits = ops.device.type == "cpu"
        self._exchange: Callable[..., tuple[Tensor, Callable[[], object]]] = self._native_all_to_all

    @override
    def close(self) -> None:
        super().close()
        dist.destroy_process_group()

    def _group(self, ranks: tuple[int, ...]) -> TorchCommunicator:
        process_group = dist.new_group(list(ranks), use_local_synchronization=True)
        group = TorchCommunicator(self.ops, ranks, self.ranks[self.rank], process_group)
        if self._exchange == self._messages:
            group.compose_all_to_all()
        return group

    @override
    def compose_all_to_all(self) -> bool:
        self._barrier()  # all ranks must take part in the first call of NCCL, and some may have no messages
        self._exchange = self._messages
        return True

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        y = _copy(x)
        dist.all_reduce(y, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, self.process_group)
        return y

    def _all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(out.unbind()), _copy(x), self.process_group)
        return out

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        y = _copy(x)
        dist.broadcast(y, self.ranks[source], self.process_group)
        return y

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        parts = list(_copy(x).chunk(self.size))
        out = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(out, parts, group=self.process_group)
        return out

    def _barrier(self) -> None:
        own = None if self.ops.device.type == "cpu" else [torch.accelerator.current_device_index()]
        dist.barrier(self.process_group, device_ids=own)

    def _all_to_all(self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
        out, wait = self._start_all_to_all(x, send, receive)
        wait()
        return out

    def _start_all_to_all(
        self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> tuple[Tensor, Callable[[], object]]:
        return self._exchange(x.detach().contiguous(), send, receive)

    def _native_all_to_all(
        self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> tuple[Tensor, Callable[[], object]]:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        work = dist.all_to_all_single(out, x, list(receive), list(send), self.process_group, async_op=True)
        return out, work.wait

    def _messages(
        self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> tuple[Tensor, Callable[[], object]]:
        """The exchange as sends and receives, in which a rank's own rows are copied."""
        out = x.new_empty((sum(receive), *x.shape[1:]))
        sent, received = x.split(send), out.split(receive)
        received[self.rank].copy_(sent[self.rank])
        operations = []
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            for call, rows, peer in ((dist.isend, sent[to], to), (dist.irecv, received[source], source)):
                if rows.numel():
                    operations.append(dist.P2POp(call, rows, group=self.process_group, group_peer=peer))
        works = dist.batch_isend_irecv(operations) if operations else []
        return out, partial(_wait_for, works, operations)

    def _differentiable(self, transfer: Transfer, x: Tensor) -> Pending:
        if x.is_floating_point() and not x.requires_grad:
            # `backward` must visit this node even on a rank whose rows are constant: the other ranks wait for it.
            x = x.detach().requires_grad_()
        return partial(_Wait.apply, transfer, _Start.apply(transfer, x))


class _Start(torch.autograd.Function):
    """Starts the send; returns a placeholder until it completes. The backward pass waits for the gradients."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, x: Tensor) -> Tensor:
        ctx.transfer = transfer
        transfer.start(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.transfer.back.wait()


class _Wait(torch.autograd.Function):
    """Waits for the rows. The backward pass starts the send of their gradients."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, sent: Tensor) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.transfer.back.start(gradients[0])


def _wait_for(works: Sequence[dist.Work], operations: Sequence[dist.P2POp]) -> None:
    """Wait for messages; `operations` keep their rows alive until then."""
    for work in works:
        work.wait()


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)
