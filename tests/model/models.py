"""Small models and batches."""

import numpy as np

from moeport.config.model import AttentionConfig, LoadBalanceConfig, ModelConfig, MoEConfig
from moeport.core.parameters import initial_parameters
from moeport.model.transformer import Batch, DecoderLM
from moeport.routers.adamoe import AdaMoEConfig
from moeport.routers.cartesian import CartesianConfig
from moeport.routers.gshard import GShardConfig
from moeport.routers.hash import HashConfig
from moeport.routers.locmoe import LocMoEConfig
from moeport.routers.locmoe_plus import LocMoEPlusConfig
from moeport.routers.maskmoe import MaskMoEConfig
from moeport.routers.rre import RREConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.switch import SwitchConfig
from moeport.routers.top_p import TopPConfig
from moeport.routers.topk import TopKConfig
from moeport.routers.xmoe import XMoEConfig
from tests.support import rng

VOCABULARY = 11
ROUTER_CONFIGS = {
    "switch": SwitchConfig(),
    "topk": TopKConfig(),
    "gshard": GShardConfig(),
    "sigmoid_bias": SigmoidBiasConfig(num_groups=2, top_groups=1),
    "top_p": TopPConfig(top_k=3, entropy_coefficient=0.1),
    "adamoe": AdaMoEConfig(top_k=2, null_experts=3),
    "xmoe": XMoEConfig(routing_dim=5),
    "cartesian": CartesianConfig(),
    "locmoe": LocMoEConfig(epsilon="noise", locality_coefficient=0.0),
    "locmoe_plus": LocMoEPlusConfig(locality_coefficient=0.0),
    "hash": HashConfig(),
    "rre": RREConfig(groups=2),
    "maskmoe": MaskMoEConfig(frequent_share=0.5, visible_frequent=3),
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
    return Batch(
        batch.token_BS[start:end],
        batch.target_BS[start:end],
        {name: noise[start:end] for name, noise in batch.noise.items()},
    )


def changed(values, seed):
    """The same parameters, moved a little, so that norms are not ones and biases not zeros."""
    return {
        name: value + np.float32(0.1) * rng(seed + i).standard_normal(value.shape).astype(np.float32)
        for i, (name, value) in enumerate(values.items())
    }
