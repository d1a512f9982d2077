"""Texts continued with a cache give what computing them anew gives."""

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.config.model import (
    AttentionConfig,
    CapacityConfig,
    ModelConfig,
    MoEConfig,
    RopeBasesConfig,
    RopeScalingConfig,
)
from moeport.config.training import BackendConfig
from moeport.core.parameters import initial_parameters
from moeport.model import cache
from moeport.model.decoder import DecoderLM
from moeport.model.decoding import CachedDecoder, RecomputingDecoder
from moeport.routers.topk import TopKConfig
from tests.conformance.targets import COMPOSED, Target, parameters
from tests.model.models import changed
from tests.routers.catalogue import EXAMPLES
from tests.support import rng

VOCABULARY = 31
TEXTS = [rng(9).integers(0, VOCABULARY, length).tolist() for length in (7, 2, 9)]
CONTEXT = 12
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2**-4}
"""Relative to the largest score. In bfloat16 each score is rounded to 8 bits after two blocks that round likewise."""


def evaluated(backend, router=None, moe=None, **options):
    """A model on a backend."""
    shapes = {"num_layers": 2, "d_model": 16, "init_std": 0.3, "attention": AttentionConfig(num_heads=2)}
    experts = {"num_experts": 8, "expert_hidden": 8, "router": router or TopKConfig(), "allow_future_tokens": True}
    model = DecoderLM(ModelConfig(**shapes | options, moe=MoEConfig(**experts | (moe or {}))), VOCABULARY)
    params = initial_parameters(model.parameter_specs(), 0, lambda: np.arange(1, VOCABULARY + 1))
    tables = {spec.name for spec in model.parameter_specs() if not spec.trainable}
    moved = {name: value for name, value in changed(params, 1).items() if name not in tables}
    return backend.evaluation_model(model, params | moved)


def check(model, steps, tolerance, context=CONTEXT):
    """Start texts together, go on with the third and the first only, and compare each score with a recomputation."""
    decoder, random = model.decoder(context), rng(3)
    scores = decoder.start(TEXTS)
    for step in range(steps):
        want = np.stack([model.logits(np.array([window]))[0, -1] for window in decoder.windows])
        assert np.abs(scores - want).max() <= tolerance * np.abs(want).max(), step
        if step == 2:
            decoder.keep([2, 0])
        scores = decoder.step(random.integers(0, VOCABULARY, len(decoder.windows)))
    return decoder


CACHED = [name for name, configs in EXAMPLES.items() if not configs[0].looks_ahead]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", CACHED)
def test_every_router_gives_what_a_recomputation_gives(name, backend):
    """Also where windows are full, which they are at different steps."""
    model = evaluated(Target(backend, "cpu", "float64").build(), EXAMPLES[name][0])
    assert isinstance(check(model, steps=13, tolerance=TOLERANCE["float64"]), CachedDecoder)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {*CACHED}))
def test_routers_that_look_ahead_are_computed_anew(name):
    model = evaluated(Target("numpy", "cpu", "float64").build(), EXAMPLES[name][0])
    assert isinstance(check(model, steps=4, tolerance=0.0), RecomputingDecoder)


@pytest.mark.parametrize("config", [config for configs in EXAMPLES.values() for config in configs[1:]], ids=str)
def test_every_variant_of_a_router_too(config):
    check(evaluated(Target("numpy", "cpu", "float64").build(), config), 6, TOLERANCE["float64"])


ATTENTION = {
    "grouped heads, norms and biases": AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, bias="all"),
    "one key head, norm of all heads": AttentionConfig(num_heads=4, num_kv_heads=1, qk_norm="whole", bias="qkv"),
    "latent": AttentionConfig(
        num_heads=2,
        kind="mla",
        q_lora_rank=6,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=3,
        rope_scaling=RopeScalingConfig(type="yarn", factor=4.0, original_positions=8, mscale_all_dim=1.0),
    ),
    "a base for each key head": AttentionConfig(
        num_heads=4, num_kv_heads=2, rope_bases=RopeBasesConfig(kind="list", values=(50.0, 3.0))
    ),
    "scaled positions": AttentionConfig(
        num_heads=2, rope_scaling=RopeScalingConfig(type="yarn", factor=4.0, original_positions=8)
    ),
}


@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_every_attention(attention, monkeypatch):
    """With a cache that grows in the middle."""
    monkeypatch.setattr(cache, "BLOCK", 5)
    model = evaluated(Target("torch", "cpu", "float64").build(), attention=attention, tie_embeddings=True)
    check(model, steps=16, tolerance=TOLERANCE["float64"], context=20)


def test_a_dense_block_after_the_experts():
    model = evaluated(
        Target("torch", "cpu", "float64").build(), moe={"residual_hidden": 5, "residual_form": "sequential"}
    )
    check(model, steps=5, tolerance=TOLERANCE["float64"])


@pytest.mark.parametrize("target", parameters([target for target in COMPOSED if not target.static]))
def test_every_backend(target):
    """MindSpore's operations of fixed shapes are for compiled models; nothing is compiled here."""
    bases = RopeBasesConfig(kind="list", values=(50.0, 3.0))
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, bias="all", rope_bases=bases)
    model = evaluated(target.build(), attention=attention, moe={"first_dense": 1, "num_shared_experts": 1})
    check(model, steps=2 if target.backend == "mindspore" else 5, tolerance=TOLERANCE[target.dtype])


@pytest.mark.parametrize("policy", ["factor", "locmoe_plus"])
def test_capacities_are_computed_anew_and_each_text_by_itself(policy):
    """An expert may drop a token for others of its text, but not for those of another text."""
    moe = {"capacity": CapacityConfig(policy=policy, factor=0.5)}
    if policy == "locmoe_plus":
        moe["router"] = EXAMPLES["locmoe_plus"][0]
    model = evaluated(Target("numpy", "cpu", "float64").build(), moe=moe)
    decoder = check(model, steps=6, tolerance=0.0)
    assert isinstance(decoder, RecomputingDecoder)
    together = model.logits(np.array([TEXTS[0], TEXTS[2][:7]]))[:, -1]
    alone = model.decoder(CONTEXT).start([TEXTS[0], TEXTS[2][:7]])
    assert policy != "factor" or not np.allclose(together, alone)


def test_rounding_to_tiles_is_of_training_only():
    model = evaluated(Target("numpy", "cpu", "float64").build(), moe={"capacity": CapacityConfig(policy="round")})
    assert isinstance(check(model, 4, TOLERANCE["float64"]), CachedDecoder)


def test_a_context_of_one_token():
    check(evaluated(Target("torch", "cpu", "float64").build()), 4, TOLERANCE["float64"], context=1)


def test_the_window_goes_on_with_the_last_half():
    decoder = evaluated(Target("numpy", "cpu", "float64").build()).decoder(4)
    decoder.start([[1, 2, 3, 4, 5, 6], [7]])
    assert decoder.windows == [[3, 4, 5, 6], [7]]
    decoder.step([8, 9])
    assert decoder.windows == [[5, 6, 8], [7, 9]]


@pytest.mark.slow
def test_a_model_whose_blocks_are_compiled_continues_texts():
    from moeport.backends.base import TrainingOptions
    from moeport.config.training import OptimizerConfig

    pytest.importorskip("torch")
    backend = get_backend(BackendConfig(name="torch", device="cpu", dtype="float64"))
    plain = evaluated(backend)
    options = TrainingOptions(OptimizerConfig(), compile=True)
    model = backend.training_model(plain.model, plain.parameters(), options)
    decoder, expected = model.decoder(CONTEXT), plain.decoder(CONTEXT)
    np.testing.assert_allclose(decoder.start(TEXTS), expected.start(TEXTS), rtol=1e-12)
    np.testing.assert_allclose(decoder.step([1, 2, 3]), expected.step([1, 2, 3]), rtol=1e-12)
