import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeport.errors import ConfigError
from moeport.routers import ROUTERS
from moeport.torch import MoE

SHAPE = {"d_model": 16, "num_experts": 4, "expert_hidden": 8, "init_std": 0.3}


def tokens(*shape, seed=0, **kwargs):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), **kwargs).float()


class TinyTransformer(nn.Module):
    """A model that is not ours, with our layer where it has its FFN."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = MoE(**SHAPE, **options)
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.ffn(x))


@pytest.mark.parametrize("router", ROUTERS)
def test_it_trains_inside_a_foreign_model(router):
    torch.manual_seed(0)
    model = TinyTransformer(router=router, router_z_loss=1e-3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ids = torch.randint(0, 11, (4, 6))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        (loss + model.ffn.auxiliary_loss).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        model.ffn.update_router_state()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_the_auxiliary_loss_reaches_the_router():
    layer = MoE(**SHAPE, load_balance={"coefficient": 1.0})
    layer(tokens(32, 16))
    layer.auxiliary_loss.backward()
    assert layer.router.weight.grad.abs().max() > 0
    assert layer.experts.w_in.grad is None


def test_state_dict_round_trip_and_copies():
    x = tokens(3, 5, 16)
    first, second = MoE(**SHAPE, seed=1), MoE(**SHAPE, seed=2)
    expected = first(x)
    assert not torch.equal(second(x), expected)
    assert set(first.state_dict()) == {"router.weight", "experts.w_in", "experts.w_out"}
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), expected)
    assert torch.equal(copy.deepcopy(first)(x), expected)
    stream = io.BytesIO()
    torch.save(first, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), expected)


def test_the_bias_of_sigmoid_bias_is_state_and_moves_against_the_load():
    layer = MoE(**SHAPE, router="sigmoid_bias", router_options={"top_k": 1, "bias_update_rate": 0.5})
    assert "router.bias" in layer.state_dict()
    assert "router.bias" not in dict(layer.named_parameters())
    layer(tokens(64, 16))
    load = layer.metrics.chosen_E.float()
    layer.update_router_state()
    assert torch.equal(layer.router.bias, 0.5 * torch.sign(load.mean() - load))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_type(dtype):
    x, layer = tokens(10, 16), MoE(**SHAPE)
    expected = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-5, atol=0.02)


def test_autocast_computes_in_the_autocast_type_over_float32_parameters():
    layer = MoE(**SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(tokens(10, 16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.experts.w_in.grad.dtype == torch.float32


def test_recomputation_changes_nothing():
    results = []
    for recompute in (False, True):
        layer, x = MoE(**SHAPE, router="gshard"), tokens(12, 16).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y.square().sum() + layer.auxiliary_loss).backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_it_compiles():
    layer, x = MoE(**SHAPE), tokens(12, 16)
    compiled = torch.compile(layer, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert layer.experts.w_out.grad.abs().sum() > 0


def test_capacity_drops_and_says_so():
    layer = MoE(**SHAPE, router="switch", capacity={"policy": "factor", "factor": 0.5})
    layer(tokens(64, 16))
    assert layer.metrics.served_E.max() <= 8
    assert layer.metrics.served_E.sum() < layer.metrics.chosen_E.sum() == 64


def test_capacity_by_name():
    x = tokens(64, 16)
    named, spelled = MoE(**SHAPE, capacity="factor"), MoE(**SHAPE, capacity={"policy": "factor", "factor": 1.25})
    assert torch.equal(named(x), spelled(x))
    assert named.layer.config.capacity.policy == "factor"


def test_sequence_scope_takes_sequences_from_the_shape():
    x = tokens(3, 8, 16)
    layer = MoE(**SHAPE, load_balance={"coefficient": 1.0, "scope": "sequence"})
    layer(x)
    whole = layer.auxiliary_loss
    parts = []
    for sequence in x:
        layer(sequence[None])
        parts.append(layer.auxiliary_loss)
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.top_k: more experts a token than there are"):
        MoE(**SHAPE, router_options={"top_k": 9})
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.name: .*topc.*did you mean topk\?"):
        MoE(**SHAPE, router="topc")
    with pytest.raises(ConfigError, match=r"factr: unknown key; did you mean model\.moe\.capacity\.factor\?"):
        MoE(**SHAPE, capacity={"factr": 2})
