"""Multi-head latent attention against DeepSeek-V2's and V3's of transformers: values, and gradients of everything."""

import contextlib
from typing import Any

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import AttentionConfig, RopeScalingConfig
from moeport.core.parameters import initial_parameters
from moeport.model.attention import attention_forward, attention_specs
from moeport.model.decoder import DecoderLM
from moeport.model.rope import attention_factor, score_factor
from tests.model.models import VOCABULARY, changed, model_config
from tests.support import assert_close, rng

HEADS, PLAIN, ROTATED, VALUE, RANK = 3, 4, 6, 5, 8
YARN = {"type": "yarn", "factor": 40.0, "original_positions": 8, "mscale": 0.707, "mscale_all_dim": 1.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "queries of a latent vector": {"q_lora_rank": 6},
    "biases": {"q_lora_rank": 6, "bias": "all"},
    "biases without a latent vector of queries": {"bias": "all"},
    "YaRN": {"rope_scaling": RopeScalingConfig(type="yarn", factor=40.0, original_positions=8)},
    "YaRN of DeepSeek": {"q_lora_rank": 6, "rope_scaling": RopeScalingConfig.model_validate(YARN)},
}
THEIRS = {
    "q": "q_proj",
    "q_down": "q_a_proj",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
    "q_norm": "q_a_layernorm",
    "kv_norm": "kv_a_layernorm",
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant):
    attention = {"num_heads": HEADS, "kv_lora_rank": RANK, "qk_nope_head_dim": PLAIN, "qk_rope_head_dim": ROTATED}
    options = {"kind": "mla", "v_head_dim": VALUE, "rope_base": 500.0, **attention, **VARIANTS[variant]}
    return model_config(attention=AttentionConfig(**options), norm_eps=1e-3)


def params_of(config):
    specs = attention_specs(config, out_std=0.3)
    return changed(initial_parameters(specs, 0), 1)


def in_their_order(name, value):
    """Rows as in their tensors: the pairs of the rotated part are neighbours."""
    pairs = np.arange(ROTATED).reshape(2, ROTATED // 2).T.reshape(-1)
    if name in ("q", "q_up"):
        order = np.concatenate([np.arange(PLAIN), PLAIN + pairs])
        return value.reshape(HEADS, PLAIN + ROTATED, -1)[:, order].reshape(value.shape)
    if name.startswith("kv_down"):
        return np.concatenate([value[:RANK], value[RANK:][pairs]])
    return value


def their_name(name):
    stem = name.removesuffix("_bias")
    return f"{THEIRS[stem]}.{'bias' if name != stem else 'weight'}"


def their_attention(family, config):
    """Their module, and the arguments of its call that say where the tokens are."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers", minversion="5.0")
    attention, scaling = config.attention, config.attention.rope_scaling
    rope = {"rope_type": "default", "rope_theta": attention.rope_base}
    if scaling.type == "yarn":
        rope |= {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": 8}
        rope |= {key: getattr(scaling, key) for key in ("mscale", "mscale_all_dim") if getattr(scaling, key)}
    theirs = getattr(transformers, f"{family}Config")(
        hidden_size=config.d_model,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=RANK,
        qk_nope_head_dim=PLAIN,
        qk_rope_head_dim=ROTATED,
        v_head_dim=VALUE,
        attention_bias=attention.bias == "all",
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    module = __import__(f"transformers.models.{_file(family)}", fromlist=[""])
    places = torch.arange(9).unsqueeze(0)
    rotary = getattr(module, f"{family}RotaryEmbedding")(theirs)
    return getattr(module, f"{family}Attention")(theirs, 0), lambda x: rotary(x, places)


def _file(family):
    name = family.replace("V", "_v").lower()
    return f"{name}.modeling_{name}"


@every_variant
@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_values_and_gradients_are_those_of_transformers(family, variant, dtype, tolerance):
    torch = pytest.importorskip("torch")
    from moeport.backends.torch.ops import TorchOps
    from tests.in_float64 import InFloat64

    config = config_of(variant).model_copy(update={"d_model": 9})  # their config wants a multiple of the heads
    kind = getattr(torch, dtype)
    params = {name: torch.tensor(value, dtype=kind) for name, value in params_of(config).items()}
    x = torch.tensor(rng(4).standard_normal((2, 9, config.d_model)), dtype=kind)
    weight = torch.tensor(rng(5).standard_normal((2, 9, config.d_model)), dtype=kind)

    with InFloat64() if dtype == "float64" else contextlib.nullcontext():
        module, places = their_attention(family, config)
        module = module.to(kind)
        state = {their_name(name): torch.tensor(in_their_order(name, value.numpy())) for name, value in params.items()}
        module.load_state_dict(state)  # which refuses names that are missing or unknown
        their_x = x.clone().requires_grad_()
        hidden = torch.triu(torch.full((9, 9), -torch.inf, dtype=kind), 1)[None, None]
        want, _ = module(their_x, position_embeddings=places(x), attention_mask=hidden)
        (want * weight).sum().backward()

    ops = TorchOps(torch.device("cpu"))
    run = DecoderLM(config, VOCABULARY).forward_pass(ops, 9, dtype)
    leaves = {"x": x, **params}
    for leaf in leaves.values():
        leaf.requires_grad_()
    got = attention_forward(run, config, params, x)
    assert isinstance(got, torch.Tensor)
    (got * weight).sum().backward()
    assert_close(got.detach().numpy(), want.detach().numpy(), tolerance)
    assert_close(x.grad.numpy(), their_x.grad.numpy(), tolerance)
    gradients = dict(module.named_parameters())
    for name, value in params.items():
        grad = gradients[their_name(name)].grad.numpy()
        assert_close(in_their_order(name, value.grad.numpy()), grad, tolerance, name)
    in_numpy = attention_forward(
        DecoderLM(config, VOCABULARY).forward_pass(NumpyOps(), 9, dtype),
        config,
        {name: value.detach().numpy() for name, value in params.items()},
        x.detach().numpy(),
    )
    assert_close(in_numpy, want.detach().numpy(), tolerance, "numpy")


@every_variant
def test_parameters_and_products_are_counted(variant):
    config = config_of(variant)
    specs = DecoderLM(config, VOCABULARY).parameter_specs()
    assert config.parameter_counts(VOCABULARY).total == sum(spec.size for spec in specs)
    in_blocks = sum(
        spec.size // (2 if spec.is_expert else 1)
        for spec in specs
        if spec.name.startswith("layers.") and len(spec.shape) > 1
    )
    heads = 6 * config.num_layers * HEADS * (PLAIN + ROTATED + VALUE) * 7
    assert config.block_flops_per_token(7) == 6 * in_blocks + heads
    matrices = [spec for spec in specs if ".attention." in spec.name and len(spec.shape) == 2]
    assert all(spec.matrices == 1 and spec.in_compute_type for spec in matrices)
    assert {spec.init for spec in specs if spec.name.endswith(("q_norm", "kv_norm"))} == {"ones"}


def test_nothing_sees_a_later_token():
    config = config_of("queries of a latent vector")
    params = {name: value.astype(np.float64) for name, value in params_of(config).items()}
    x = rng(6).standard_normal((1, 9, config.d_model))
    run = DecoderLM(config, VOCABULARY).forward_pass(NumpyOps(), 9, "float64")

    def attend(x, causal=True):
        return np.asarray(attention_forward(run, config, params, x, causal))

    whole = attend(x)
    np.testing.assert_array_equal(attend(np.concatenate([x[:, :5], x[:, 5:] + 1], axis=1))[:, :5], whole[:, :5])
    assert not np.allclose(attend(x, causal=False)[:, 0], whole[:, 0])


def test_the_factors_of_yarn_are_those_of_deepseek():
    """DeepSeek-V2 has a factor of 40 with both at 0.707: no factor of the tables, and 1.26^2 of the scores."""
    scaling = RopeScalingConfig(type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert attention_factor(scaling) == 1.0
    assert score_factor(scaling) == pytest.approx(1.2608**2, rel=1e-4)
    plain = RopeScalingConfig(type="yarn", factor=40.0)
    assert attention_factor(plain) == pytest.approx(1.3689, rel=1e-4)
    assert score_factor(plain) == 1.0
