"""Scaled rotary positions against transformers, on sizes of published models."""

import numpy as np
import pytest

from moeport.config.model import RopeScalingConfig
from moeport.model.rope import attention_factor, rope_tables

SCALINGS = {
    "none": (RopeScalingConfig(), {"rope_type": "default"}),
    "linear": (RopeScalingConfig(type="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScalingConfig(type="llama3", factor=8.0, original_positions=8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeScalingConfig(type="yarn", factor=4.0, original_positions=32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn, all options": (
        RopeScalingConfig(
            type="yarn", factor=2.5, original_positions=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3
        ),
        {
            "rope_type": "yarn",
            "factor": 2.5,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
    ),
}


@pytest.mark.parametrize("head_dim", [64, 128, 6])
@pytest.mark.parametrize("base", [500000.0, 10000.0])
@pytest.mark.parametrize(("ours", "theirs"), SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers(ours, theirs, base, head_dim):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": base, **theirs},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rope_tables(2, head_dim, base, ours)
    angles = np.arctan2(sin[1], cos[1])
    want = torch.cat((rotary.inv_freq, rotary.inv_freq)).double().numpy()
    np.testing.assert_allclose(angles, want, rtol=2e-6)
    assert np.hypot(sin[1], cos[1]) == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_only_yarn_multiplies_the_tables():
    assert [attention_factor(ours) for ours, _ in SCALINGS.values()] == [1, 1, 1, pytest.approx(1.138629), 1.3]
    assert attention_factor(RopeScalingConfig(type="yarn", factor=0.5)) == 1
