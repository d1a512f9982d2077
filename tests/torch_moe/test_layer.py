import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeport.config.model import CapacityConfig, MoEConfig, MoELayerConfig
from moeport.errors import BackendUnavailableError, ConfigError, UserError
from moeport.routers import ROUTERS
from moeport.routers.switch import SwitchConfig
from moeport.torch import MoE

SHAPE: dict[str, Any] = {"d_model": 16, "num_experts": 4, "expert_hidden": 8, "init_std": 0.3}


def tokens(*shape, seed=0, **kwargs):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), **kwargs).float()


class TinyTransformer(nn.Module):
    """A model that is not ours, with our layer where it has its FFN."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = MoE(**SHAPE, vocab_size=11, **options)
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.ffn(x, ids))


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
    first, second = MoE(**SHAPE), MoE(**SHAPE)
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
    x, layer = tokens(10, 16), MoE(**SHAPE, seed=0)
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
        layer, x = MoE(**SHAPE, router="gshard", seed=0), tokens(12, 16).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y.square().sum() + layer.auxiliary_loss).backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_capacity_drops_and_says_so():
    layer = MoE(**SHAPE, router="switch", capacity={"policy": "factor", "factor": 0.5})
    layer(tokens(64, 16))
    assert layer.metrics.served_E.max() <= 8
    assert layer.metrics.served_E.sum() < layer.metrics.chosen_E.sum() == 64


def test_capacity_by_name():
    x = tokens(64, 16)
    named, spelled = (
        MoE(**SHAPE, seed=0, capacity=option) for option in ("factor", {"policy": "factor", "factor": 1.25})
    )
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


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_where_experts_choose_they_do_so_in_each_sequence(router):
    """No permission is needed here: the layer cannot know whether its model is causal."""
    layer = MoE(**SHAPE, router=router)
    x = tokens(3, 6, 16)
    alone = torch.stack([layer(x[i]) for i in range(3)])
    torch.testing.assert_close(layer(x), alone)
    assert not torch.allclose(layer(x.reshape(1, 18, 16)).reshape(3, 6, 16), alone)


def test_mixed_shared_experts_and_a_dense_block():
    layer = MoE(**SHAPE, num_shared_experts=1, shared_mixing="softmax", residual_hidden=6)
    assert layer.mixing.weight.shape == (2, 16)
    assert layer.dense.w_in.shape == (12, 16)
    y = layer(tokens(5, 16))
    with torch.no_grad():
        layer.dense.w_out.zero_()
    assert (layer(tokens(5, 16)) - y).abs().min() > 0


def test_shared_experts_with_a_gate_of_their_own():
    layer = MoE(**SHAPE, num_shared_experts=1, shared_hidden=6, shared_mixing="sigmoid")
    assert layer.mixing.weight.shape == (1, 16)
    assert layer.shared.w_in.shape == (12, 16)
    x = tokens(5, 16)
    y, gate = layer(x), torch.sigmoid(x @ layer.mixing.weight.T)
    with torch.no_grad():
        gate_up = x @ layer.shared.w_in.T
        shared = (torch.nn.functional.silu(gate_up[:, :6]) * gate_up[:, 6:]) @ layer.shared.w_out.T
        layer.shared.w_out.zero_()
    torch.testing.assert_close(y, layer(x) + gate * shared)


def test_experts_of_locmoe_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"d_model: not divisible by model.moe.num_experts = 5, while locmoe gives"):
        MoE(**SHAPE | {"num_experts": 5}, router="locmoe")


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.top_k: more experts per token than there are"):
        MoE(**SHAPE, router_options={"top_k": 9})
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.name: .*topc.*did you mean topk\?"):
        MoE(**SHAPE, router="topc")
    with pytest.raises(ConfigError, match=r"factr: unknown key; did you mean model\.moe\.capacity\.factor\?"):
        MoE(**SHAPE, capacity={"factr": 2})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_shared_expert": 1}, r"num_shared_expert: .*moeport\.torch\.MoE; did you mean num_shared_experts\?"),
        ({"devise": "cpu"}, r"devise: .*did you mean device\?"),
        ({"router_option": {}}, r"router_option: .*did you mean router_options\?"),
        ({"n_shared_experts": 1}, r"did you mean num_shared_experts\?"),
        ({"hidden_size": 16}, r"did you mean d_model\?"),
        ({"top_k": 2}, r"top_k: .*did you mean router_options=\{'top_k': \.\.\.\}\?"),
        ({"capacity_factor": 2}, r"did you mean capacity=\{'factor': \.\.\.\}\?"),
        ({"xyzzy": 2}, r"xyzzy: .*expected one of d_model, .*, kernels, num_experts, .*, load_balance, router_z_loss"),
        ({"every": 2}, r"every: model\.moe\.every applies to the layers of a whole model, but .* is one layer"),
        ({"router": 3}, r"model\.moe\.router: is an integer"),
        ({"kernels": "defalt"}, r"^kernels: is not a choice .*did you mean default\?"),
        ({"kernels": {"swigglu": "default"}}, r"^kernels: swigglu is not a kernel .*did you mean swiglu\?"),
    ],
)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(option, message):
    with pytest.raises(ConfigError, match=message):
        MoE(**SHAPE, **option)


def test_an_operator_of_another_device_is_refused_where_it_would_run():
    layer = MoE(**SHAPE, kernels={"swiglu": "npu_swiglu", "rope": "default"})
    with pytest.raises(
        BackendUnavailableError, match="swiglu: cpu has no operator named npu_swiglu; set swiglu to auto"
    ):
        layer(torch.zeros(2, SHAPE["d_model"]))


def test_options_are_those_of_the_config():
    """Sections of a config are taken as they are, and nothing beside model.moe is a default of the layer."""
    section = MoEConfig(router=SwitchConfig(), num_shared_experts=1, capacity=CapacityConfig(policy="factor"))
    of_models = MoEConfig.model_fields.keys() - MoELayerConfig.model_fields.keys()
    values = section.model_dump(mode="json", exclude={*of_models})
    layer = MoE(**SHAPE, **{name: value for name, value in values.items() if name not in SHAPE})
    assert layer.layer.config.model_dump(exclude={*SHAPE, "allow_future_tokens"}) == section.model_dump(
        exclude={*SHAPE, "allow_future_tokens"}
    )
    plain = MoE(**SHAPE, capacity=None, load_balance=None, router=None)
    assert plain.layer.config == MoEConfig(num_experts=4, expert_hidden=8, allow_future_tokens=True)


def test_a_router_that_looks_at_ids_has_a_balanced_table_of_them():
    counts = 1_000_000 // np.arange(20, 520)
    layers = [
        MoE(**SHAPE, router="hash", vocab_size=500, token_counts=given, seed=seed)
        for given, seed in ((counts, 0), (torch.tensor(counts), 0), (counts.tolist(), 1), (None, 0), (counts[:300], 0))
    ]
    balanced, same, other, uniform, padded = (layer.router.experts[:, 0].long().numpy() for layer in layers)
    load = np.bincount(balanced, counts, 4)
    assert load.max() / load.mean() < 1.001
    assert (same == balanced).all()
    assert (other != balanced).any()
    assert np.bincount(uniform).tolist() == [125] * 4
    assert np.bincount(padded[:300], counts[:300], 4).max() < 1.001 * counts[:300].sum() / 4
    ids = torch.randint(0, 500, (3, 5))
    layers[0](tokens(3, 5, 16), ids)
    assert layers[0].metrics.chosen_E.tolist() == np.bincount(balanced[ids.flatten()], minlength=4).tolist()


def test_tables_are_state_that_nothing_trains():
    layer = MoE(**SHAPE, router="maskmoe", vocab_size=500, token_counts=range(500))
    assert "router.visible" in layer.state_dict()
    assert "router.visible" not in dict(layer.named_parameters())
    before = layer.router.visible.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        (layer(tokens(4, 16), torch.arange(4)).square().sum() + layer.auxiliary_loss).backward()
        optimizer.step()
        layer.update_router_state()
    assert torch.equal(layer.router.visible, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tables_keep_their_numbers_in_another_type(dtype):
    """bfloat16 has no 257."""
    shape = SHAPE | {"num_experts": 400, "seed": 0}
    layer = MoE(**shape, router="hash", vocab_size=2000)
    table = layer.router.experts.clone()
    assert table.max() == 399
    assert torch.equal(MoE(**shape, router="hash", vocab_size=2000, dtype=dtype).router.experts, table)
    model = nn.Sequential(layer).to(dtype)
    assert layer.experts.w_in.dtype == dtype
    assert layer.router.experts.dtype == torch.float32
    assert torch.equal(model[0].router.experts, table)
    assert layer.to("meta").to_empty(device="cpu").router.experts.dtype == torch.float32


@pytest.mark.parametrize("router", ["hash", "rre", "random", "maskmoe"])
def test_routers_that_look_at_ids_say_so(router):
    with pytest.raises(UserError, match=rf"router {router} needs the number of vocabulary ids.*expected vocab_size"):
        MoE(**SHAPE, router=router)
    with pytest.raises(UserError, match=r"token_counts has the shape \(9,\); expected one number.*vocab_size \(8\)"):
        MoE(**SHAPE, router=router, vocab_size=8, token_counts=range(9))
    layer = MoE(**SHAPE, router=router, vocab_size=8)
    expected = rf"router {router} looks at vocabulary ids; expected token_ids of the shape \(2, 3\), .*got "
    with pytest.raises(UserError, match=expected + "none"):
        layer(tokens(2, 3, 16))
    with pytest.raises(UserError, match=expected + r"the shape \(3,\)"):
        layer(tokens(2, 3, 16), torch.zeros(3, dtype=torch.long))
