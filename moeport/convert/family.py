"""The families of models that can be converted: a table of how each differs from the others.

Everything here is read off the classes of transformers, which `tests/convert/test_families.py` compares with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moeport.errors import UserError, choices


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers: what its layers have, and which keys of config.json say so."""

    model_type: str
    architecture: str
    """The class that `architectures` names."""
    defaults: Mapping[str, Any]
    """What transformers takes for keys that config.json leaves out."""
    bias: Literal["none", "qkv", "attention_bias", "qkv_bias"] = "none"
    """Biases of attention: none, always those of queries, keys and values, or as the key of that name says."""
    qk_norm: bool | Literal["whole"] = False
    """As `model.attention.qk_norm`."""
    has_head_dim: bool = True
    """Whether the width of a head may differ from hidden_size / num_attention_heads."""
    window: Literal["sliding_window", "use_sliding_window"] | None = None
    """The key that turns a sliding window on; None if there is none."""
    experts: str | None = None
    """The key of the number of experts; None for a dense model."""
    expert_hidden: str = "moe_intermediate_size"
    """The key of an expert's hidden width."""
    normalized: Literal["always", "norm_topk_prob"] = "norm_topk_prob"
    """Whether gates are divided by their sum: always, or as the key says."""
    has_dense_layers: bool = False
    """Whether decoder_sparse_step and mlp_only_layers make some layers dense."""
    has_shared_expert: bool = False
    """Whether a shared expert with a sigmoid gate is added."""
    expert_block: str = "mlp"
    """Name of the block of experts, in the layout with a tensor per expert."""
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's projections in that layout."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys for which moeport has the one value given here."""
    is_latent: bool = False
    """Whether it is a model of DeepSeek: latent attention, and experts as `moeport.convert.deepseek` reads them."""
    router: Literal["topk", "sigmoid_bias"] = "topk"
    """Our router."""
    balance: Literal["router_aux_loss_coef", "aux_loss_alpha"] = "router_aux_loss_coef"
    """The key of the weight of the load-balancing loss."""
    own_code: Mapping[str, str] = field(default_factory=dict)
    """The value of auto_map in folders that bring the code from which the class of transformers was made."""

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts. Its feed-forward blocks are then a mixture of one expert, which is the same."""
        return self.experts is None

    @property
    def base(self) -> float:
        """Base of the rotary angles that transformers takes where config.json has none."""
        return float(self.defaults["rope_theta"])


_COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
    "num_key_value_heads": None,
}
_BALANCE = {"router_aux_loss_coef": 0.001, "output_router_logits": False}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_QWEN_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}
_QWEN_DENSE = {
    **_COMMON,
    **_WINDOW,
    "layer_types": None,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
}

_DEEPSEEK = {
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "pretraining_tp": 1,
    "aux_loss_alpha": None,
    "seq_aux": None,
}
_DEEPSEEK_ONLY = {"pretraining_tp": 1, "moe_layer_freq": 1, "ep_size": 1}
_LATENT: dict[str, Any] = {
    "is_latent": True,
    "has_head_dim": False,
    "experts": "n_routed_experts",
    "balance": "aux_loss_alpha",
}


def _code_of(name: str) -> dict[str, str]:
    parts = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {
        key: f"{'configuration' if part == 'Config' else 'modeling'}_deepseek.{name}{part}"
        for key, part in parts.items()
    }


FAMILIES = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        {
            **_COMMON,
            **_BALANCE,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "router_jitter_noise": 0.0,
        },
        window="sliding_window",
        experts="num_local_experts",
        expert_hidden="intermediate_size",
        normalized="always",
        expert_block="block_sparse_moe",
        expert_names=("w1", "w3", "w2"),
        only={"router_jitter_noise": 0.0},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **_COMMON,
            **_BALANCE,
            **_QWEN_EXPERTS,
            **_WINDOW,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": None,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
        bias="attention_bias",
        qk_norm=True,
        window="use_sliding_window",
        experts="num_experts",
        has_dense_layers=True,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        {
            **_COMMON,
            **_BALANCE,
            "router_aux_loss_coef": 0.01,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "clip_qkv": None,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "norm_topk_prob": False,
        },
        bias="attention_bias",
        qk_norm="whole",
        has_head_dim=False,
        experts="num_experts",
        expert_hidden="intermediate_size",
        only={"clip_qkv": None},
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_COMMON,
            **_BALANCE,
            **_QWEN_EXPERTS,
            **_WINDOW,
            "layer_types": None,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": None,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "qkv_bias": True,
        },
        bias="qkv_bias",
        window="use_sliding_window",
        experts="num_experts",
        has_dense_layers=True,
        has_shared_expert=True,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **_COMMON,
            **_DEEPSEEK,
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "moe_intermediate_size": 1407,
            "num_experts_per_tok": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "mlp_bias": False,
        },
        **_LATENT,
        own_code=_code_of("DeepseekV2"),
        only={**_DEEPSEEK_ONLY, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **_COMMON,
            **_DEEPSEEK,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "num_nextn_predict_layers": 1,
        },
        **_LATENT,
        router="sigmoid_bias",
        own_code=_code_of("DeepseekV3"),
        only={**_DEEPSEEK_ONLY, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        {
            **_COMMON,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
        bias="attention_bias",
        only={"mlp_bias": False, "pretraining_tp": 1},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_QWEN_DENSE, "head_dim": 128, "attention_bias": False},
        bias="attention_bias",
        qk_norm=True,
        window="use_sliding_window",
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        {**_QWEN_DENSE, "head_dim": None},
        bias="qkv",
        window="use_sliding_window",
    ),
)
"""The families, in the order in which one is looked for that can express a model."""

BY_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(model_type: str) -> Family:
    """The family of this name. Raises UserError if there is none."""
    if model_type not in BY_TYPE:
        raise UserError(f"model_type {model_type}: cannot be converted; {choices(model_type, BY_TYPE)}")
    return BY_TYPE[model_type]
