"""Run by each rank of a job: collectives of hccl on the device, against what they must give."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def exchange(rank):
    """Uneven parts, with a gradient."""
    sent, received = (([1, 3], [1, 2]), ([2, 2], [3, 2]))[rank]
    x = (torch.arange(4.0) + 10 * rank).npu().requires_grad_()
    y = all_to_all_single(torch.empty(sum(received), device="npu"), x, received, sent)
    assert y.tolist() == ([0, 10, 11], [1, 2, 3, 12, 13])[rank]
    (y * (rank + 1)).sum().backward()
    assert x.grad.tolist() == ([1, 2, 2, 2], [1, 1, 2, 2])[rank]


def empty_parts(rank):
    """A rank that sends everything to the other, in bfloat16."""
    sent, received = (([0, 3], [0, 0]), ([0, 0], [3, 0]))[rank]
    x = torch.ones(sum(sent), 2, dtype=torch.bfloat16, device="npu")
    y = torch.zeros(sum(received), 2, dtype=torch.bfloat16, device="npu")
    dist.all_to_all_single(y, x, received, sent)
    assert y.tolist() == [[1, 1]] * sum(received)


def lists(rank):
    parts = [torch.full((2 + other,), 10.0 * rank + other).npu() for other in range(2)]
    found = [torch.empty(2 + rank, device="npu") for _ in range(2)]
    dist.all_to_all(found, parts)
    assert [x.tolist() for x in found] == [[10.0 * other + rank] * (2 + rank) for other in range(2)]


def reductions(rank):
    x = (torch.arange(4.0) + 10 * rank).npu()
    for operation, wanted in (
        (dist.ReduceOp.SUM, [10, 12, 14, 16]),
        (dist.ReduceOp.AVG, [5, 6, 7, 8]),
        (dist.ReduceOp.MAX, [10, 11, 12, 13]),
        (dist.ReduceOp.MIN, [0, 1, 2, 3]),
    ):
        whole, part = x.clone(), torch.empty(2, device="npu")
        dist.all_reduce(whole, operation)
        dist.reduce_scatter_tensor(part, x, operation)
        assert whole.tolist() == wanted
        assert part.tolist() == wanted[2 * rank :][:2]
    to_one = x.clone()
    dist.reduce(to_one, 1)
    assert to_one.tolist() == (x.tolist(), [10, 12, 14, 16])[rank]


def copies(rank):
    x = torch.full((2,), float(rank)).npu()
    whole = torch.empty(4, device="npu")
    dist.all_gather_into_tensor(whole, x)
    assert whole.tolist() == [0, 0, 1, 1]
    parts = [torch.empty(2, device="npu") for _ in range(2)]
    dist.all_gather(parts, x)
    assert [part.tolist() for part in parts] == [[0, 0], [1, 1]]
    dist.gather(x, parts if rank == 1 else None, 1)
    dist.scatter(part := torch.empty(2, device="npu"), [x, x + 5] if rank == 0 else None, 0)
    assert part.tolist() == ([0, 0], [5, 5])[rank]
    dist.broadcast(y := x.clone(), 1)
    assert y.tolist() == [1, 1]
    found = [None, None]
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": 0}, {"rank": 1}]
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    assert x.tolist() == [0, 0]
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    dist.barrier()


def refusals(rank):
    for message, call in (
        ("tensors of the device alone", lambda: dist.all_reduce(torch.ones(2))),
        ("does not reduce", lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32).npu(), dist.ReduceOp.BXOR)),
        (
            r"\[1, 2\] are no parts of 2 rows",
            lambda: dist.all_to_all_single(torch.empty(2, device="npu"), torch.ones(2).npu(), [1, 2], [1, 1]),
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def sharded(rank):
    """A step of FSDP2 gives the parameters of one process; a DTensor goes from shards to copies and back."""
    found = []
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3)).to(device)
        x = torch.randn(4, 6).to(device)
        if device == "npu":
            fully_shard(model, mesh=init_device_mesh("npu", (2,)))
            x = x.chunk(2)[rank]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
        found.append([p.full_tensor().cpu() if device == "npu" else p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    x = torch.arange(6.0).view(3, 2)
    there = distribute_tensor(x.npu(), init_device_mesh("npu", (2,)), [Shard(0)])
    assert there.redistribute(placements=[Replicate()]).to_local().tolist() == x.tolist()


def main():
    rank = int(sys.argv[1])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=sys.argv[2], rank=rank, world_size=2)
    assert dist.get_backend() == "hccl"
    for check in (exchange, empty_parts, lists, reductions, copies, refusals, sharded):
        check(rank)
        print("ok", check.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
