"""Shared, fine-grained and residual experts with every router: one layer, forward and backward."""

from typing import Any

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import AttentionConfig, ModelConfig, MoEConfig
from moeport.conformance import formulas
from moeport.core.parameters import initial_value
from moeport.core.routing import RouterContext
from moeport.model.moe import MoELayer
from moeport.routers import ROUTERS
from tests.conformance.targets import Target
from tests.model.reference import mixed
from tests.support import assert_close, grid, rng

TOKENS, WIDTH, SEQUENCES, VOCABULARY = 24, 16, 2, 10
EXPERTS, HIDDEN = 4, 6
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared, added": {"num_shared_experts": 2, "shared_mixing": "add"},
    "shared, mixed": {"num_shared_experts": 1, "shared_mixing": "softmax"},
    "shared, gated": {"num_shared_experts": 1, "shared_hidden": 5, "shared_mixing": "sigmoid"},
    "fine-grained": {"num_experts": 2 * EXPERTS, "expert_hidden": HIDDEN // 2},
    "residual": {"residual_hidden": 5},
    "fine-grained, shared and residual": {
        "num_experts": 2 * EXPERTS,
        "expert_hidden": HIDDEN // 2,
        "num_shared_experts": 1,
        "shared_mixing": "softmax",
        "residual_hidden": 5,
    },
}
every_router = pytest.mark.parametrize("router", ROUTERS)
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def layer_of(router, variant):
    options = {"num_experts": EXPERTS, "expert_hidden": HIDDEN, "router_z_loss": 0.1, "allow_future_tokens": True}
    config = MoEConfig.model_validate({**options, **variant, "router": {"name": router}})
    return MoELayer(config, WIDTH, init_std=0.02, out_std=0.01, vocab_size=VOCABULARY)


def values(layer):
    """(trained, other) parameters by name, float64, and hidden states with the trained ones."""
    trained, others = {"x": rng(1).standard_normal((TOKENS, WIDTH))}, {}
    for i, spec in enumerate(layer.parameter_specs()):
        if spec.trainable:
            trained[spec.name] = grid(i, *spec.shape)
        else:
            others[spec.name] = initial_value(spec, 0).astype(np.float64)
    return trained, others


def run(layer, ops, trained, others):
    """(output, auxiliary loss)."""
    context = RouterContext(
        layer=0,
        training=True,
        token_ids_T=ops.from_numpy(rng(2).integers(VOCABULARY, size=TOKENS)),
        noise={name: ops.from_numpy(rng(3 + i).random(TOKENS, np.float32)) for i, name in enumerate(layer.noise)},
        num_sequences=SEQUENCES,
    )
    params = {name: value for name, value in (trained | others).items() if name != "x"}
    y_TD, metrics = layer.forward(ops, params, trained["x"], context)
    return y_TD, layer.auxiliary_loss(ops, metrics)


def on_numpy(router, variant):
    layer = layer_of(router, variant)
    trained, others = values(layer)
    return run(layer, NumpyOps(), trained, others)[0], trained


@every_router
@every_variant
def test_the_gradient_along_a_direction_is_that_of_the_reference(router, variant):
    """PyTorch's backward pass against a central difference of the numpy forward pass, all parameters at once."""
    layer, backend = layer_of(router, variant), Target("torch", "cpu", "float64").build()
    trained, others = values(layer)
    out_TD = grid(50, TOKENS, WIDTH)
    direction = {name: rng(60 + i).standard_normal(value.shape) for i, (name, value) in enumerate(trained.items())}

    def loss(ops, inputs):
        y_TD, auxiliary = run(layer, ops, inputs, {name: ops.from_numpy(value) for name, value in others.items()})
        return ops.sum(y_TD * ops.from_numpy(out_TD)) + auxiliary

    step = 1e-6
    ends = [
        loss(NumpyOps(), {name: value + sign * step * direction[name] for name, value in trained.items()})
        for sign in (1, -1)
    ]
    value, grads = backend.value_and_grad(lambda inputs: loss(backend.ops, inputs))(
        {name: backend.ops.from_numpy(array) for name, array in trained.items()}
    )
    want = (ends[0] - ends[1]) / (2 * step)
    got = sum(float((backend.ops.to_numpy(grads[name]) * direction[name]).sum()) for name in trained)
    assert abs(want) > 1e-2
    assert_close(got, want, 1e-6)
    assert_close(backend.ops.to_numpy(value), loss(NumpyOps(), trained), 1e-12)


@every_router
def test_shared_and_dense_parts_are_added_to_the_routed_experts(router):
    """y = routed + shared + FFN: what the others add does not depend on the router."""
    routed, _ = on_numpy(router, {})
    for variant in (VARIANTS["shared, added"], VARIANTS["residual"]):
        y_TD, params = on_numpy(router, variant)
        name = "dense" if "residual_hidden" in variant else "shared"
        part = formulas.mlp(params["x"], params[f"{name}.w_in"], params[f"{name}.w_out"], "swiglu")
        assert_close(y_TD, routed + part, 1e-12)


@pytest.mark.parametrize(
    ("width", "hidden", "heads", "head_dim", "layers", "experts", "every", "total"),
    [
        (768, 3072, 12, 64, 12, 16, 4, 650e6),
        (2048, 8192, 24, 128, 24, 32, 6, 8.7e9),
        (3072, 12288, 24, 128, 32, 32, 4, 34e9),
    ],
    ids=["Base/16E", "8B/32E", "34B/32E"],
)
def test_parameters_of_openmoe(width, hidden, heads, head_dim, layers, experts, every, total):
    """Table 2 of arXiv 2402.01739: top-2 of experts as wide as the dense block beside them, umT5's 256k vocabulary."""
    moe = MoEConfig(num_experts=experts, expert_hidden=hidden, every=every, residual_hidden=hidden)
    config = ModelConfig(
        num_layers=layers,
        d_model=width,
        dense_hidden=hidden,
        attention=AttentionConfig(num_heads=heads, head_dim=head_dim),
        moe=moe,
        tie_embeddings=True,
    )
    assert config.parameter_counts(256_384).total == pytest.approx(total, rel=0.02)


@every_router
def test_mixed_parts_are_weighted_by_a_softmax(router):
    routed, _ = on_numpy(router, {})
    y_TD, params = on_numpy(router, VARIANTS["shared, mixed"])
    shared = formulas.mlp(params["x"], params["shared.w_in"], params["shared.w_out"], "swiglu")
    assert_close(y_TD, mixed(params, params["x"], routed, shared), 1e-12)
