"""One rank of a job of two: each case compares a data-parallel layer with one process that has the joined batch."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moeport.torch import record
from tests.torch_moe.layers import EXTRAS, STATEFUL, inputs, make

STEPS, MICRO_BATCHES, TOKENS = 2, 2, 24


class Block(nn.Module):
    """Somebody's model; the layer is called once or twice."""

    def __init__(self, name, calls=1, recompute=False):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(16), make(**STATEFUL[name], **EXTRAS, seed=0)
        self.calls, self.recompute = calls, recompute

    def forward(self, x):
        for _ in range(self.calls):
            normed = self.norm(x)
            x = x + (checkpoint(self.ffn, normed, use_reentrant=False) if self.recompute else self.ffn(normed))
        return x


def batch(step, micro, rank):
    """Different on each rank."""
    (x,) = inputs(make(), 2, TOKENS, seed=100 * step + 10 * micro + rank, requires_grad=False)
    return x


def train(model, group, batch_of):
    """Steps of accumulated gradients; the weights stay, so that only the router state moves."""
    ffn = (model.module if isinstance(model, DistributedDataParallel) else model).ffn
    parameters, states = [*model.parameters()], []  # the shards: after an evaluation FSDP2 shows whole ones
    for step in range(STEPS):
        for parameter in parameters:
            parameter.grad = None
        for micro in range(MICRO_BATCHES):
            y = model(batch_of(step, micro))
            ((y.square().mean() + ffn.auxiliary_loss) / MICRO_BATCHES).backward()
        model.eval()
        with torch.no_grad():
            model(batch(7, 7, dist.get_rank()))
        model.train()
        ffn.update_router_state(group)
        states.append(torch.cat([buffer.flatten().clone() for buffer in ffn.buffers()]))
    return torch.stack(states)


def alone(name, **options):
    """One process with the tokens of both ranks."""
    return train(Block(name, **options), None, lambda s, m: torch.cat([batch(s, m, rank) for rank in (0, 1)]))


def check(name, states, expected):
    others = [torch.empty_like(states) for _ in range(2)]
    dist.all_gather(others, states)
    assert torch.equal(*others), f"the ranks drifted apart: {others}"
    assert states[-1].any()
    if name == "bias":
        assert torch.equal(states, expected), (states, expected)


def mine(step, micro):
    return batch(step, micro, dist.get_rank())


def data_parallel(name):
    model = DistributedDataParallel(Block(name))
    check(name, train(model, dist.group.WORLD, mine), alone(name))


def data_parallel_that_looks_for_unused_parameters(name):
    model = DistributedDataParallel(Block(name, calls=2), find_unused_parameters=True)
    check(name, train(model, dist.group.WORLD, mine), alone(name, calls=2))


def sharded_parts(name):
    model = Block(name, recompute=True)
    for part in (model.ffn.experts, model.ffn.router, model.ffn.shared, model.ffn.mixing, model.ffn.dense, model):
        fully_shard(part)
    assert isinstance(model.ffn.experts.w_in, DTensor)
    shards = dict(model.named_parameters())
    with torch.no_grad():
        for shard in model.ffn.parameters():
            shard.fill_(float("nan"))
    model.ffn.reset_parameters()
    for key, whole in Block(name).ffn.named_parameters():
        assert torch.equal(shards[f"ffn.{key}"].full_tensor(), whole), key
    check(name, train(model, dist.group.WORLD, mine), alone(name))
    single = Block(name)
    (single(torch.cat([batch(0, 0, rank) for rank in (0, 1)])).square().mean()).backward()
    for shard in shards.values():
        shard.grad = None
    for buffer, first in zip(model.buffers(), single.buffers(), strict=True):
        buffer.copy_(first)
    model(mine(0, 0)).square().mean().backward()
    for (key, sharded), whole in zip(shards.items(), single.parameters(), strict=True):
        error = (sharded.grad.full_tensor() - whole.grad).abs().max()
        assert error <= 1e-4 * whole.grad.abs().max(), key


def sharded_in_bfloat16(name):
    model = Block(name)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model.ffn.experts, model):
        fully_shard(part, mp_policy=policy)
    states = train(model, dist.group.WORLD, mine)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    others = [torch.empty_like(states) for _ in range(2)]
    dist.all_gather(others, states)
    assert torch.equal(*others)


def a_rank_without_tokens_or_calls(name):
    rank, model = dist.get_rank(), DistributedDataParallel(Block(name))
    expected = train(Block(name), None, lambda step, micro: batch(step, micro, 0))
    check(
        name, train(model, dist.group.WORLD, lambda s, m: batch(s, m, 0) if rank == 0 else batch(s, m, 0)[:0]), expected
    )
    layer, single = (make(**STATEFUL[name], seed=0) for _ in range(2))
    single(batch(0, 0, 0))
    single.update_router_state()
    if rank == 0:
        layer(batch(0, 0, 0))
    layer.update_router_state(dist.group.WORLD)
    for buffer, expected in zip(layer.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def recorded(name):
    models = [Block(name), Block(name)]
    for part in (models[0].ffn.experts, models[0]):
        fully_shard(part)
    found = []
    for model in models:
        with record(model) as recording:
            model(batch(0, 0, 0)).square().mean().backward()
        found.append(recording.recording.tensors)
    plain = {key.replace("FSDP", "") for key in found[0]}
    assert {key for key in found[1] if key.startswith(("parameter", "gradient"))} <= plain


CASES = [
    (case, name)
    for case, names in (
        (data_parallel, ["bias", "both"]),
        (data_parallel_that_looks_for_unused_parameters, ["bias"]),
        (sharded_parts, ["bias"]),
        (sharded_in_bfloat16, ["both"]),
        (a_rank_without_tokens_or_calls, ["bias"]),
        (recorded, ["bias"]),
    )
    for name in names
]


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with (folder / f"done.{rank}").open("w") as done:
        for case, name in CASES:
            case(name)
            print(f"{case.__name__} {name}", file=done, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
