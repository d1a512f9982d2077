"""The routers of transformers as oracles of ours."""

import numpy as np
import pytest
import torch

from moeport.backends.torch.ops import TorchOps
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.topk import TopKConfig
from tests.support import assert_close, rng

mixtral = pytest.importorskip("transformers.models.mixtral")
qwen3_moe = pytest.importorskip("transformers.models.qwen3_moe")
olmoe = pytest.importorskip("transformers.models.olmoe")
deepseek_v2 = pytest.importorskip("transformers.models.deepseek_v2")
deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3")

EXPERTS, WIDTH, TOKENS = 8, 16, 64
X_TD = torch.tensor(rng(1).standard_normal((TOKENS, WIDTH)), dtype=torch.float32)
WEIGHT = torch.tensor(rng(2).standard_normal((EXPERTS, WIDTH)), dtype=torch.float32)
BIAS = torch.tensor(rng(3).standard_normal(EXPERTS) / 4, dtype=torch.float32)
SIZES = {"hidden_size": WIDTH, "num_local_experts": EXPERTS}


def ours(config, **params):
    """Gates by expert, (T, E); 0 where not chosen."""
    ops = TorchOps(torch.device("cpu"))
    routing = build_router(config, WIDTH, EXPERTS).route(
        ops, {"weight": WEIGHT, **params}, X_TD, RouterContext(layer=0, training=False)
    )
    return gates_by_expert(routing.expert_N.reshape(TOKENS, -1), routing.weight_N.reshape(TOKENS, -1))


def theirs(router):
    with torch.no_grad():
        router.weight.copy_(WEIGHT)
        _, gates, experts = router(X_TD)
    return gates_by_expert(experts, gates)


def gates_by_expert(experts, gates):
    return torch.zeros(TOKENS, EXPERTS).scatter(1, experts, gates).numpy()


def assert_same_routing(got, want, choices):
    assert ((got != 0).sum(axis=1) == choices).all()
    assert np.array_equal(got != 0, want != 0)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_mixtral(k):
    config = mixtral.MixtralConfig(**SIZES, num_experts_per_tok=k)
    want = theirs(mixtral.modeling_mixtral.MixtralTopKRouter(config))
    assert_same_routing(ours(TopKConfig(top_k=k)), want, k)
    assert_same_routing(ours(TopKConfig(top_k=k, softmax="after")), want, k)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_qwen3_moe(k, normalize):
    config = qwen3_moe.Qwen3MoeConfig(**SIZES, num_experts_per_tok=k, norm_topk_prob=normalize)
    want = theirs(qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter(config))
    assert_same_routing(ours(TopKConfig(top_k=k, normalize_gates=normalize)), want, k)


@pytest.mark.parametrize("normalize", [True, False])
def test_olmoe(normalize):
    config = olmoe.OlmoeConfig(hidden_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=normalize)
    want = theirs(olmoe.modeling_olmoe.OlmoeTopKRouter(config))
    assert_same_routing(ours(TopKConfig(top_k=3, normalize_gates=normalize)), want, 3)


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_deepseek_v2(groups, top_groups):
    """Their routed_scaling_factor is as in V3."""
    config = deepseek_v2.DeepseekV2Config(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=16.0,
    )
    own = TopKConfig(top_k=2, normalize_gates=False, num_groups=groups, top_groups=top_groups)
    want = theirs(deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter(config))
    assert_same_routing(16 * ours(own), want, 2)


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (2, 1), (4, 2), (4, 3)])
def test_deepseek_v3(groups, top_groups, normalize, scaling):
    """Their gates carry routed_scaling_factor; ours scale the layer's output by it instead."""
    config = deepseek_v3.DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
        routed_scaling_factor=scaling,
    )
    router = deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(BIAS)
    own = SigmoidBiasConfig(top_k=2, num_groups=groups, top_groups=top_groups, normalize_gates=normalize)
    assert_same_routing(scaling * ours(own, bias=BIAS), theirs(router), 2)
