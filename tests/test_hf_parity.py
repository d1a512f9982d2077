"""Mixtral and Qwen3-MoE of transformers: the same weights give the same logits, losses and gradients."""

import contextlib
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import AttentionConfig, LoadBalanceConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.losses import load_balance_loss
from moeport.core.routing import RouterContext, Routing
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.routers import build_router
from moeport.routers.topk import TopKConfig
from tests.in_float64 import InFloat64
from tests.support import assert_close, rng

transformers = pytest.importorskip("transformers", minversion="5.0")

VOCABULARY, WIDTH, HEADS, EXPERTS, HIDDEN, DENSE_HIDDEN = 13, 16, 4, 6, 10, 14
BASE, BALANCE = 500.0, 0.1
TOKENS = rng(1).integers(0, VOCABULARY, (3, 8))
TARGETS = rng(2).integers(0, VOCABULARY, (3, 8))
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    "experts_implementation": "eager",
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Pair:
    """One architecture in their terms and ours."""

    family: str
    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    top_k: int = 2
    normalize: bool = True
    tie: bool = False
    every: int = 1
    first_dense: int = 0
    eps: float = 1e-5

    @functools.cached_property
    def ours(self):
        one_layer = (self.layers - self.first_dense) // self.every == 1
        return ModelConfig(
            num_layers=self.layers,
            d_model=WIDTH,
            attention=AttentionConfig(
                num_heads=HEADS,
                num_kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                qk_norm=self.family == "qwen3_moe",
                rope_base=BASE,
            ),
            dense_hidden=DENSE_HIDDEN,
            moe=MoEConfig(
                num_experts=EXPERTS,
                expert_hidden=HIDDEN,
                every=self.every,
                first_dense=self.first_dense,
                router=TopKConfig(top_k=self.top_k, normalize_gates=self.normalize),
                load_balance=LoadBalanceConfig(coefficient=BALANCE if one_layer else 0.0),
            ),
            tie_embeddings=self.tie,
            norm_eps=self.eps,
        )

    def theirs(self):
        """A model with random weights."""
        common = SHARED | {
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts_per_tok": self.top_k,
            "tie_word_embeddings": self.tie,
            "rms_norm_eps": self.eps,
        }
        if self.family == "mixtral":
            config = transformers.MixtralConfig(**common, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
            model = transformers.MixtralForCausalLM(config)
        else:
            config = transformers.Qwen3MoeConfig(
                **common,
                intermediate_size=DENSE_HIDDEN,
                moe_intermediate_size=HIDDEN,
                num_experts=EXPERTS,
                norm_topk_prob=self.normalize,
                decoder_sparse_step=self.every,
                mlp_only_layers=list(range(self.first_dense)),
            )
            model = transformers.Qwen3MoeForCausalLM(config)
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            centre = 1.0 if "norm" in name else 0.0
            parameter.data = torch.tensor(
                centre + 0.3 * rng(seed).standard_normal(parameter.shape), dtype=torch.float32
            )
        model.tie_weights()
        return model


PAIRS = {
    "mixtral": Pair("mixtral"),
    "mixtral, tied, one key head": Pair("mixtral", tie=True, kv_heads=1),
    "mixtral, wide heads": Pair("mixtral", head_dim=6, kv_heads=4),
    "mixtral, one layer": Pair("mixtral", layers=1, top_k=3),
    "qwen3": Pair("qwen3_moe", eps=1e-6),
    "qwen3, tied, gates not normalised": Pair("qwen3_moe", normalize=False, tie=True),
    "qwen3, one expert a token": Pair("qwen3_moe", normalize=False, top_k=1),
    "qwen3, every second layer": Pair("qwen3_moe", every=2, top_k=3),
    "qwen3, first layer dense": Pair("qwen3_moe", first_dense=1, normalize=False),
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])

NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "self_attn.q_proj.weight": "attention.q",
    "self_attn.k_proj.weight": "attention.k",
    "self_attn.v_proj.weight": "attention.v",
    "self_attn.o_proj.weight": "attention.out",
    "self_attn.q_norm.weight": "attention.q_norm",
    "self_attn.k_norm.weight": "attention.k_norm",
    "mlp.gate.weight": "moe.router.weight",
    "mlp.experts.gate_up_proj": "moe.experts.w_in",
    "mlp.experts.down_proj": "moe.experts.w_out",
    "mlp.down_proj.weight": "mlp.w_out",
}
"""Their name to ours, inside a layer where it is in one."""


def converted(theirs):
    """Their parameters, or gradients, under our names."""
    found = {}
    for name, value in theirs.items():
        layer, short = "", name
        if name.startswith("model.layers."):
            _, _, index, short = name.split(".", 3)
            layer = f"layers.{index}."
        if short == "mlp.gate_proj.weight":
            value = torch.cat((value, theirs[name.replace("gate_proj", "up_proj")]))
            found[f"{layer}mlp.w_in"] = value.detach().numpy()
        elif short != "mlp.up_proj.weight":
            found[layer + NAMES[short]] = value.detach().numpy()
    return found


@functools.cache
def their_results(pair, dtype):
    """(parameters, logits, loss, auxiliary loss, gradients) of transformers, under our names."""
    with InFloat64() if dtype == "float64" else contextlib.nullcontext():
        model = pair.theirs()
        model.to(getattr(torch, dtype))
        out = model(torch.tensor(TOKENS), output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits.reshape(-1, VOCABULARY), torch.tensor(TARGETS).reshape(-1))
        (loss + pair.ours.moe.load_balance.coefficient / pair.top_k * out.aux_loss).backward()
    named = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in named.items()}
    return converted(named), out.logits.detach().numpy(), loss.item(), out.aux_loss.item(), converted(gradients)


def our_model(pair, name, dtype):
    """Our evaluation model on a backend with their parameters."""
    params = their_results(pair, dtype)[0]
    backend = get_backend(BackendConfig(name=name, device="cpu", dtype=dtype))
    model = DecoderLM(pair.ours, VOCABULARY)
    assert params.keys() == {spec.name for spec in model.parameter_specs()}
    return backend.evaluation_model(model, params)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@every_dtype
@every_pair
def test_logits_and_losses(pair, dtype, tolerance, backend):
    _, logits, loss, balance, _ = their_results(pair, dtype)
    ours = our_model(pair, backend, dtype)
    got = ours.logits(TOKENS)
    assert got.dtype == dtype
    assert_close(got, logits, tolerance)
    terms = ours.evaluate(Batch(TOKENS, TARGETS))
    assert_close(terms.cross_entropy.item(), loss, tolerance)
    if pair.ours.moe.load_balance.coefficient:
        assert_close(pair.top_k * terms.load_balance.item(), balance, tolerance)


@every_dtype
@every_pair
def test_gradients(pair, dtype, tolerance):
    params, _, _, _, gradients = their_results(pair, dtype)
    backend = get_backend(BackendConfig(name="torch", device="cpu", dtype=dtype))
    options = TrainingOptions(OptimizerConfig())
    training = backend.training_model(DecoderLM(pair.ours, VOCABULARY), params, options)
    training.accumulate(Batch(TOKENS, TARGETS), 1.0)
    got = training.gradients()
    assert got.keys() == gradients.keys()
    for name, want in gradients.items():
        assert np.abs(want).max() > 0
        assert_close(got[name], want, tolerance, name)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_their_load_balancing_loss_is_top_k_times_ours_over_all_layers_at_once(top_k, layers):
    """They add up the k choices where Switch and we average, and pool the tokens of all layers."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = rng(3).standard_normal((layers, 20, EXPERTS))
    theirs = load_balancing_loss_func(tuple(torch.tensor(logits)), EXPERTS, top_k)
    router = build_router(TopKConfig(top_k=top_k), EXPERTS, EXPERTS)
    routing = router.route(
        NumpyOps(), {"weight": np.eye(EXPERTS)}, logits.reshape(-1, EXPERTS), RouterContext(layer=0, training=True)
    )
    assert isinstance(routing, Routing)
    assert_close(top_k * load_balance_loss(NumpyOps(), routing, 1), theirs.item(), 1e-6)
