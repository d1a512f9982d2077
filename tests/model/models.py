"""Small models and batches."""

import numpy as np

from moeport.config.model import AttentionConfig, LoadBalanceConfig, ModelConfig, MoEConfig
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.routers import BY_NAME
from tests.support import rng

VOCABULARY = 11
SMALL = {
    "sigmoid_bias": {"num_groups": 2, "top_groups": 1},
    "top_p": {"top_k": 3, "entropy_coefficient": 0.1},
    "adamoe": {"top_k": 2, "null_experts": 3},
    "xmoe": {"routing_dim": 5},
    "locmoe": {"epsilon": "noise", "locality_coefficient": 0.0},
    "locmoe_plus": {"locality_coefficient": 0.0},
    "rre": {"groups": 2},
    "maskmoe": {"frequent_share": 0.5, "visible_frequent": 3},
}
"""Options of routers whose defaults do not show much in a small model."""
WHOLE_BATCH = ("sinkhorn_token_choice", "base", "random")
ROUTER_CONFIGS = {
    name: router.config_class.model_validate(SMALL.get(name, {}))
    for name, router in BY_NAME.items()
    if not router.config_class.fixed_load and name not in WHOLE_BATCH
}
"""All but those whose choices or losses depend on the whole micro-batch, as Sinkhorn token choice, random and the
locality loss do."""


def model_config(router="topk", moe=None, **options):
    """Two blocks of width 8 with 4 experts of width 6, all losses on, large initial weights."""
    experts = {
        "num_experts": 4,
        "expert_hidden": 6,
        "router": ROUTER_CONFIGS[router],
        "router_z_loss": 0.01,
        "load_balance": LoadBalanceConfig(coefficient=0.1, scope="sequence"),
    }
    shapes = {
        "num_layers": 2,
        "d_model": 8,
        "attention": AttentionConfig(num_heads=2, num_kv_heads=1, qk_norm=True),
        "init_std": 0.5,
        "output_z_loss": 0.01,
    }
    return ModelConfig(**shapes | options, moe=MoEConfig(**experts | (moe or {})))


def model_and_params(config, seed=0):
    model = DecoderLM(config, VOCABULARY)
    return model, initial_parameters(model.parameter_specs(), seed)


def batch_of(model, batch_size=4, sequence_length=5, seed=1):
    """Random tokens with the noise of step 0."""
    tokens = rng(seed).integers(0, model.vocab_size, (batch_size, sequence_length + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], model.noise(batch_size, sequence_length, seed, step=0))


def rows(batch, start, end):
    """Some sequences of a batch, with their noise."""
    return batch.rows(start, end)


def changed(values, seed):
    """The same parameters, moved a little, so that norms are not ones and biases not zeros."""
    return {
        name: value + np.float32(0.1) * rng(seed + i).standard_normal(value.shape).astype(np.float32)
        for i, (name, value) in enumerate(values.items())
    }
