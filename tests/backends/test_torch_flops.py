"""The FLOPs that the config states are those that the built model executes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moeport.backends.base import TrainingOptions
from moeport.backends.torch.backend import TorchBackend
from moeport.config.model import ModelConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM

VOCAB, BATCH, SEQUENCE = 40, 3, 16

LATENT = {
    "kind": "mla",
    "num_heads": 3,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "shared experts and dense blocks": {"moe": {"num_shared_experts": 2, "every": 2}},
    "gelu": {"moe": {"activation": "gelu", "first_dense": 1}},
    "grouped heads": {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True}},
    "latent attention": {"attention": {**LATENT, "q_lora_rank": 7}},
    "latent attention, plain queries": {"attention": LATENT},
    "switch": {"moe": {"router": {"name": "switch"}}},
    "sigmoid_bias": {"moe": {"router": {"name": "sigmoid_bias", "top_k": 3}}},
}


@pytest.mark.parametrize("name", MODELS)
def test_products_with_weights_cost_what_the_config_says(name):
    values = {"num_layers": 4, "d_model": 24, **MODELS[name]}
    values["moe"] = {"num_experts": 4, "expert_hidden": 20} | values.get("moe", {})
    values.setdefault("attention", {"num_heads": 2})
    config = ModelConfig.model_validate(values)
    lm = DecoderLM(config, VOCAB)
    params = initial_parameters(lm.parameter_specs(), 0)
    backend = TorchBackend(BackendConfig(device="cpu"))
    model = backend.training_model(lm, params, TrainingOptions(OptimizerConfig()))
    ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQUENCE))
    with FlopCounterMode(display=False) as counter:
        model.accumulate(Batch(ids, ids), 1.0)
    counts = counter.get_flop_counts()["Global"]
    not_counted = 2 * VOCAB * config.d_model * BATCH * SEQUENCE  # the head's weight gradient: addmm_ is unknown to it
    executed = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) + not_counted
    stated = config.training_flops_per_token(VOCAB, SEQUENCE) * BATCH * SEQUENCE
    widths = config.num_heads * (config.head_dim + config.value_dim)
    attention = 6 * config.num_layers * widths * SEQUENCE * BATCH * SEQUENCE
    assert executed == stated - attention


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_built_model(name):
    config = ModelConfig.model_validate({"num_layers": 4, "d_model": 24, "attention": {"num_heads": 2}, **MODELS[name]})
    lm = DecoderLM(config, VOCAB)
    backend = TorchBackend(BackendConfig(device="cpu"))
    params = initial_parameters(lm.parameter_specs(), 0)
    module = backend.training_model(lm, params, TrainingOptions(OptimizerConfig())).module
    assert config.parameter_counts(VOCAB).total == sum(p.numel() for p in module.parameters())
