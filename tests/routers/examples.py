"""The routers' configs of configs/, and one way to run a router on numpy or any other backend."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config import load_config
from moeport.core.parameters import initial_value
from moeport.core.routing import RouterContext
from moeport.routers import BY_NAME, build_router
from tests.support import grid, rng

EXPERTS, WIDTH, TOKENS = 8, 16, 12
TOKEN_COUNTS = np.array([1, 50, 0, 30, 2, 40, 3, 0, 20, 5])
"""Of the ids of a small vocabulary."""

SEQUENCES = 3
"""Of the routers in which experts choose tokens."""
FILES = sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml"))


@functools.cache
def shipped() -> dict[str, list[Any]]:
    """Router name to the different configs that the files in configs/ have for it."""
    found: dict[str, list[Any]] = {name: [] for name in BY_NAME}
    for path in FILES:
        config = load_config(path).model.moe.router
        if config not in found[config.name]:
            found[config.name].append(config)
    return found


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
