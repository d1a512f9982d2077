"""Random small models of transformers, saved as their users have them."""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from safetensors import safe_open

from moeport.convert.family import BY_TYPE
from tests.in_float64 import InFloat64
from tests.support import rng

VOCABULARY, POSITIONS = 23, 16


SCALINGS = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
)


@dataclass(frozen=True)
class Case:
    """A model of a family."""

    family: str
    seed: int
    dtype: str = "float32"
    fused: bool = False
    shards: bool = False
    options: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.family}-{self.seed}"


def random_case(family, seed):
    """A case with shapes, switches, type and layout drawn at random."""
    draw = rng((seed, sum(map(ord, family))))

    def one(*values):
        return values[draw.integers(len(values))]

    kv_heads, layers, known = one(1, 2, 4), one(1, 2, 3), BY_TYPE[family]
    width = 4 * one(2, 4, 6)
    experts = one(2, 3, 5)
    options = {
        "hidden_size": width,
        "intermediate_size": one(5, 8, 12),
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": one(True, False),
        "rms_norm_eps": one(1e-5, 1e-6),
        "initializer_range": one(0.02, 0.1),
        "rope_parameters": {"rope_theta": one(10000.0, 500.0, 1e6), **one(*SCALINGS)},
        "head_dim": one(2, 4, 6) if known.has_head_dim else width // 4,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": None,
    }
    if not known.has_head_dim:
        del options["head_dim"]
    if known.is_latent:
        options |= _latent(family, one, options)
    if known.bias in ("attention_bias", "qkv_bias"):
        options[known.bias] = one(True, False)
    if not known.is_dense and not known.is_latent:
        options |= {
            known.experts: experts,
            "num_experts_per_tok": one(1, 2, experts),
            "router_aux_loss_coef": one(0.1, 0.003),
        }
        if known.normalized != "always":
            options["norm_topk_prob"] = one(True, False)
    if known.has_dense_layers:
        step = one(1, min(2, layers))
        sparse = list(range(step - 1, layers, step))
        options |= {"moe_intermediate_size": one(3, 6), "decoder_sparse_step": step}
        options["mlp_only_layers"] = one([], sparse[:-1])
    if known.has_shared_expert:
        options["shared_expert_intermediate_size"] = one(6, 7, 12)
    return Case(family, seed, one("float32", "bfloat16", "float16"), one(True, False), one(True, False), options)


def _latent(family, one, options):
    """Options of DeepSeek's models. V2 of transformers computes only with even widths."""
    experts = one((4, 1, 1), (4, 2, 1), (8, 4, 2), (6, 2, 2))
    found = {
        "num_key_value_heads": None,
        "q_lora_rank": one(None, 5, 8),
        "kv_lora_rank": one(4, 6),
        "qk_nope_head_dim": one(2, 4),
        "qk_rope_head_dim": one(2, 4, 6),
        "v_head_dim": one(3, 4, 6),
        "attention_bias": one(True, False),
        "num_hidden_layers": 2,
        "first_k_dense_replace": one(0, 1),
        "moe_intermediate_size": one(3, 6),
        "n_shared_experts": one(1, 2),
        "n_routed_experts": experts[0],
        "num_experts_per_tok": one(1, 2),
        "n_group": experts[1],
        "topk_group": experts[2],
        "routed_scaling_factor": one(1.0, 2.5),
    }
    if options["rope_parameters"]["rope_type"] == "yarn" and one(True, False):
        mscales = {"mscale": one(1.0, 0.7), "mscale_all_dim": one(1.0, 0.4)}
        found["rope_parameters"] = {**options["rope_parameters"], "factor": 40.0, **mscales}
    own = {"norm_topk_prob": one(True, False)}
    return found | (own if family == "deepseek_v3" else {"topk_method": one("greedy", "group_limited_greedy")})


def model_of(case):
    """The model with random weights, none of which is its initial value."""
    kind = BY_TYPE[case.family].architecture
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**case.options)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, kind)(config).eval()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        centre = 1.0 if "norm" in name else 0.0
        values = centre + 0.3 * rng((case.seed, number)).standard_normal(parameter.shape)
        parameter.data = torch.tensor(values, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor(0.1 * rng((case.seed, len(name))).standard_normal(buffer.shape)))
    model.tie_weights()
    return model


def save(case, folder):
    """Save the model of a case; returns it."""
    model = model_of(case).to(getattr(torch, case.dtype))
    size = 500 if case.shards else 10**9
    model.save_pretrained(folder, save_original_format=not case.fused, max_shard_size=size)
    return model


def tensors(folder):
    """Type, shape and bytes of every tensor of a folder by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                assert name not in found
                value = opened.get_tensor(name)
                found[name] = (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def their_logits(model, tokens, dtype):
    """Logits of transformers as numpy, computed in a type throughout."""
    with torch.no_grad(), InFloat64() if dtype == "float64" else contextlib.nullcontext():
        model = model.to(getattr(torch, dtype))
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


TOKENS = rng(9).integers(0, VOCABULARY, (2, 11))
assert TOKENS.dtype == np.int64
