"""Small models on the NPU, one of each kind."""

import functools

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.torch.model import TorchTrainingModel
from moeport.config.model import AttentionConfig, CapacityConfig, RopeBasesConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from tests.model.models import ROUTER_CONFIGS, batch_of, changed, model_and_params, model_config

LATENT = AttentionConfig(
    kind="mla",
    num_heads=2,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
BASES = RopeBasesConfig(kind="list", values=(50.0, 3.0))
KINDS = {
    **{f"router {name}": {"router": name} for name in ROUTER_CONFIGS},
    "capacity": {"moe": {"capacity": CapacityConfig(policy="factor", factor=0.6)}},
    "gelu": {"moe": {"activation": "gelu"}},
    "one expert": {"router": "switch", "moe": {"num_experts": 1}},
    "shared experts": {"moe": {"num_shared_experts": 1, "shared_hidden": 6, "shared_mixing": "sigmoid"}},
    "residual": {"moe": {"residual_hidden": 6}},
    "a dense block after the experts": {"moe": {"residual_hidden": 6, "residual_form": "sequential"}},
    "a dense block": {"dense_hidden": 6, "moe": {"dense_layers": (0,)}},
    "tied embeddings": {"tie_embeddings": True},
    "a rotary base for each key head": {
        "attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rope_bases=BASES)
    },
    "latent attention": {"router": "sigmoid_bias", "attention": LATENT},
}
"""By name, arguments of `model_config`."""


@functools.cache
def backend(device, dtype="float32", kernels="auto"):
    """The backend, whose fused kernels have been tried once."""
    return get_backend(BackendConfig(name="torch", device=device, dtype=dtype, kernels=kernels))


def built(kind, its_backend, **options):
    """A training model and a batch for it."""
    model, params = model_and_params(model_config(**KINDS[kind]))
    training_options = TrainingOptions(OptimizerConfig(), **options)
    placed = TorchTrainingModel(its_backend.ops, its_backend.dtype, model, changed(params, 50), training_options, None)
    return placed, batch_of(model)
