"""Configs of every router, and one way to run them on numpy or any other backend."""

import numpy as np

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.routing import RouterContext
from moeport.routers import build_router
from moeport.routers.adamoe import AdaMoEConfig
from moeport.routers.cartesian import CartesianConfig
from moeport.routers.gshard import GShardConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.sinkhorn import SinkhornTokenChoiceConfig
from moeport.routers.switch import SwitchConfig
from moeport.routers.top_p import TopPConfig
from moeport.routers.topk import TopKConfig
from moeport.routers.xmoe import XMoEConfig
from tests.support import grid, rng

EXPERTS, WIDTH, TOKENS = 8, 6, 12

EXAMPLES = {
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
    "sinkhorn_token_choice": [SinkhornTokenChoiceConfig(), SinkhornTokenChoiceConfig(top_k=1, sinkhorn_iterations=3)],
}
"""By router name."""
OTHER_PARAMETERS = ("adamoe", "xmoe")
"""Routers that train something else than one weight (E, D)."""
VARIABLE = ("top_p", "adamoe")
"""Routers that give some tokens fewer than K experts, in evaluation too."""
CONFIGS = [config for configs in EXAMPLES.values() for config in configs]


def label(config):
    return "-".join(str(value) for value in config.model_dump().values())


def router_params(router, seed=0):
    """float64 values of every parameter by name."""
    return {spec.name: grid(seed + i, *spec.shape) for i, spec in enumerate(router.parameter_specs())}


def hidden_states(seed=10, tokens=TOKENS):
    return rng(seed).standard_normal((tokens, WIDTH))


def context(router, training=True, tokens=TOKENS, seed=20):
    """A context with the noise that the router wants."""
    noise = {name: rng(seed).random(tokens) for name in router.noise} if training else {}
    return RouterContext(layer=0, training=training, noise=noise)


def route(config, params=None, x_TD=None, training=True, num_experts=EXPERTS, seed=20):
    """The routing by numpy in float64."""
    router = build_router(config, WIDTH, num_experts)
    x_TD = hidden_states() if x_TD is None else x_TD
    return router.route(NumpyOps(), params or router_params(router), x_TD, context(router, training, len(x_TD), seed))


def choices(routing):
    """(experts, gates), each (T, K)."""
    shape = (routing.num_tokens, -1)
    return routing.expert_N.reshape(shape), routing.weight_N.reshape(shape)


def logits_as_tokens(logits_TE):
    """(params, x) for which the router's logits are these: an identity weight."""
    return {"weight": np.eye(logits_TE.shape[1])}, logits_TE
