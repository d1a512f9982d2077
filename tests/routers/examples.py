"""Configs of every router, and one way to run them on numpy or any other backend."""

from dataclasses import replace
from typing import Any

import numpy as np

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.parameters import initial_value
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.adamoe import AdaMoEConfig
from moeport.routers.base_layers import BaseLayersConfig
from moeport.routers.cartesian import CartesianConfig
from moeport.routers.expert_choice import ExpertChoiceConfig, ExpertsChooseConfig
from moeport.routers.gshard import GShardConfig
from moeport.routers.hash import HashConfig
from moeport.routers.locmoe import LocMoEConfig
from moeport.routers.locmoe_plus import LocMoEPlusConfig
from moeport.routers.maskmoe import MaskMoEConfig
from moeport.routers.random import RandomConfig
from moeport.routers.rre import RREConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.sinkhorn import SinkhornTokenChoiceConfig
from moeport.routers.sinkhorn_expert_choice import SinkhornExpertChoiceConfig
from moeport.routers.soft import SoftConfig
from moeport.routers.sparsity_constrained import SparsityConstrainedExpertChoiceConfig
from moeport.routers.switch import SwitchConfig
from moeport.routers.top_p import TopPConfig
from moeport.routers.topk import TopKConfig
from moeport.routers.xmoe import XMoEConfig
from tests.support import grid, rng

EXPERTS, WIDTH, TOKENS = 8, 16, 12
TOKEN_COUNTS = np.array([1, 50, 0, 30, 2, 40, 3, 0, 20, 5])
"""Of the ids of a small vocabulary."""

EXAMPLES: dict[str, list[Any]] = {
    "switch": [SwitchConfig()],
    "topk": [
        TopKConfig(),
        TopKConfig(top_k=3, normalize_gates=False),
        TopKConfig(top_k=3, softmax="after"),
        TopKConfig(top_k=1),
        TopKConfig(top_k=EXPERTS),
    ],
    "gshard": [GShardConfig(), GShardConfig(random_second=False)],
    "sigmoid_bias": [
        SigmoidBiasConfig(),
        SigmoidBiasConfig(top_k=3, normalize_gates=False),
        SigmoidBiasConfig(num_groups=4, top_groups=2),
        SigmoidBiasConfig(num_groups=8, top_groups=3),
    ],
    "top_p": [
        TopPConfig(),
        TopPConfig(top_k=EXPERTS, threshold=0.8),
        TopPConfig(threshold=0.6, entropy_coefficient=0.0),
    ],
    "adamoe": [AdaMoEConfig(), AdaMoEConfig(top_k=1), AdaMoEConfig(top_k=EXPERTS, null_experts=1)],
    "xmoe": [XMoEConfig(routing_dim=3), XMoEConfig(top_k=3, routing_dim=4, initial_temperature=0.1)],
    "cartesian": [CartesianConfig(), CartesianConfig(top_k=1)],
    "locmoe": [
        LocMoEConfig(nodes=2),
        LocMoEConfig(scores="mean", relu="before_choice", nodes=2),
        LocMoEConfig(relu="after_choice", epsilon="bias", temperature=0.5, nodes=3, locality_smoothing=0.2),
        LocMoEConfig(epsilon="noise", locality_coefficient=0.0),
    ],
    "locmoe_plus": [
        LocMoEPlusConfig(nodes=4, locality_coefficient=0.5),
        LocMoEPlusConfig(top_k=4, threshold=0.6, gates="normalized", nodes=2),
        LocMoEPlusConfig(top_k=3, threshold=0.3, temperature=2.0, gates="cosine", nodes=5),
    ],
    "sinkhorn_token_choice": [SinkhornTokenChoiceConfig(), SinkhornTokenChoiceConfig(top_k=1, sinkhorn_iterations=3)],
    "base": [BaseLayersConfig()],
    "expert_choice": [
        ExpertChoiceConfig(),
        ExpertChoiceConfig(mean_experts=0.4, group="batch"),
        ExpertChoiceConfig(mean_experts=EXPERTS),
    ],
    "sinkhorn_expert_choice": [
        SinkhornExpertChoiceConfig(),
        SinkhornExpertChoiceConfig(mean_experts=3.5, group="batch", sinkhorn_iterations=3),
    ],
    "sparsity_constrained_expert_choice": [
        SparsityConstrainedExpertChoiceConfig(),
        SparsityConstrainedExpertChoiceConfig(mean_experts=6.5, group="batch", solver_iterations=3),
    ],
    "soft": [SoftConfig(), SoftConfig(slots_per_expert=3)],
    "hash": [HashConfig(), HashConfig(top_k=3)],
    "rre": [RREConfig(), RREConfig(groups=4)],
    "random": [RandomConfig(), RandomConfig(inference="sequence")],
    "maskmoe": [MaskMoEConfig(), MaskMoEConfig(top_k=3, visible_infrequent=2, visible_frequent=6)],
}
"""By router name."""
OTHER_PARAMETERS = ("adamoe", "xmoe", "locmoe", "locmoe_plus", "hash", "rre", "random")
"""Routers that train something else than one weight (E, D)."""
VARIABLE = ("top_p", "adamoe", "locmoe_plus", "maskmoe")
"""Routers that give some tokens fewer than K experts, in evaluation too."""
CONFIGS = [config for configs in EXAMPLES.values() for config in configs if not config.fixed_load]
"""Of the routers in which tokens choose experts."""
EXPERTS_CHOOSE = [
    config for configs in EXAMPLES.values() for config in configs if isinstance(config, ExpertsChooseConfig)
]
"""Of the routers in which experts choose tokens, from SEQUENCES sequences."""
SEQUENCES = 3


def label(config):
    return "-".join(str(value) for value in config.model_dump().values())


def build(config, num_experts=EXPERTS):
    return build_router(config, WIDTH, num_experts, vocab_size=len(TOKEN_COUNTS))


def router_params(router, seed=0):
    """float64 values of every parameter by name."""

    def value(spec, seed):
        return initial_value(spec, seed, TOKEN_COUNTS).astype(float) if spec.is_table else grid(seed, *spec.shape)

    return {spec.name: value(spec, seed + i) for i, spec in enumerate(router.parameter_specs())}


def trained_weight(router):
    """The name of its weight, in a list; none if its scores have no trained weight."""
    return [spec.name for spec in router.parameter_specs() if spec.name == "weight" and spec.trainable]


def hidden_states(seed=10, tokens=TOKENS):
    return rng(seed).standard_normal((tokens, WIDTH))


def token_ids(seed=15, tokens=TOKENS):
    return rng(seed).integers(len(TOKEN_COUNTS), size=tokens)


def context(router, training=True, tokens=TOKENS, seed=20):
    """A context with the noise that the router wants, of one sequence, or of several where they matter most."""
    names = router.noise if training else ()
    noise = {name: rng(seed + i).random(tokens).astype(np.float32) for i, name in enumerate(names)}
    sequences = SEQUENCES if router.config.fixed_load else 1
    return RouterContext(0, training, token_ids(tokens=tokens), noise, num_sequences=sequences)


def placed_context(ops, router):
    """`context` with arrays of a backend."""
    own = context(router)
    noise = {name: ops.from_numpy(u) for name, u in own.noise.items()}
    return replace(own, token_ids_T=ops.from_numpy(own.token_ids_T), noise=noise)


def route(config, params=None, x_TD=None, training=True, num_experts=EXPERTS, seed=20):
    """The routing by numpy in float64."""
    router = build(config, num_experts)
    x_TD = hidden_states() if x_TD is None else x_TD
    return router.route(NumpyOps(), params or router_params(router), x_TD, context(router, training, len(x_TD), seed))


def choices(routing):
    """(experts, gates), each (T, K)."""
    shape = (routing.num_tokens, -1)
    return routing.expert_N.reshape(shape), routing.weight_N.reshape(shape)


def logits_as_tokens(logits_TE) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(params, x) for which the router's logits are these: an identity weight."""
    return {"weight": np.eye(logits_TE.shape[1])}, logits_TE
