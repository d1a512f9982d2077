"""OpenMoE's released residual form, one after the other; test_combinations.py has the printed one, in parallel."""

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config import config_from_dict
from moeport.conformance import formulas
from moeport.core.parameters import initial_parameters, subtree
from moeport.core.routing import RouterContext
from moeport.errors import ConfigError
from moeport.model.decoder import DecoderLM
from tests.conformance.targets import COMPOSED, TOLERANCE, Target, parameters
from tests.model.models import VOCABULARY, changed, model_config
from tests.model.reference import moe_layer
from tests.support import assert_close, grid, rng

SEQUENCES, LENGTH = 2, 5
every_router = pytest.mark.parametrize("router", ["topk", "cartesian"])


def config_of(form="sequential", router="topk"):
    return model_config(router, {"residual_hidden": 5, "residual_form": form}, num_layers=1)


def values(config):
    """(parameters of the block, hidden states), float64; attention adds nothing."""
    block = DecoderLM(config, VOCABULARY).blocks[0]
    params = changed(initial_parameters(block.parameter_specs(), 0), 1)
    params["attention.out"] = np.zeros_like(params["attention.out"])
    x_BSD = rng(2).standard_normal((SEQUENCES, LENGTH, config.d_model))
    return {name: value.astype(np.float64) for name, value in params.items()}, x_BSD


def applied(config, ops, dtype, params, x_BSD):
    model = DecoderLM(config, VOCABULARY)
    run = model.forward_pass(ops, LENGTH, dtype, training=True)
    return model.blocks[0].forward(run, params, x_BSD, RouterContext(0, True, num_sequences=SEQUENCES))[0]


def mlp(params, x_TD):
    return formulas.mlp(x_TD, params["w_in"], params["w_out"], "swiglu")


def written_out(config, params, x_TD):
    """The block by its formula. In the released code the experts are `mlp` and the dense block is `extra_mlp`, with
    `pre_extra_mlp_layernorm` before it.
    """
    experts_only = config.moe.model_copy(update={"residual_hidden": 0})
    for suffix, layer in DecoderLM(config, VOCABULARY).blocks[0].moe.items():
        own = subtree(f"moe{suffix}", params)
        normed = formulas.rms_norm(x_TD, params[f"mlp_norm{suffix}.weight"], config.norm_eps)
        routing = layer.router.route(NumpyOps(), subtree("router", own), normed, RouterContext(0, True))
        x_TD = x_TD + moe_layer(experts_only, own, normed, routing)[0]
        normed = formulas.rms_norm(x_TD, params[f"dense_norm{suffix}.weight"], config.norm_eps)
        x_TD = x_TD + mlp(subtree("dense", own), normed)
    return x_TD


@every_router
@pytest.mark.parametrize("target", parameters([target for target in COMPOSED if target.dtype != "bfloat16"]))
def test_a_block_is_what_the_formula_says(target, router):
    config, backend = config_of(router=router), target.build()
    params, x_BSD = values(config)
    placed = {name: backend.ops.cast(backend.ops.from_numpy(v), backend.dtype) for name, v in params.items()}
    x_on_device = backend.ops.cast(backend.ops.from_numpy(x_BSD), backend.dtype)
    got = backend.ops.to_numpy(applied(config, backend.ops, backend.dtype, placed, x_on_device))
    want = written_out(config, params, x_BSD.reshape(-1, config.d_model))
    assert_close(got.reshape(want.shape), want, 10 * TOLERANCE[target.dtype])


@every_router
def test_the_gradient_along_a_direction_is_that_of_the_formula(router):
    config, backend = config_of(router=router), Target("torch", "cpu", "float64").build()
    params, x_BSD = values(config)
    inputs, out_BSD = params | {"x": x_BSD}, grid(5, *x_BSD.shape)
    direction = {name: rng(10 + i).standard_normal(value.shape) for i, (name, value) in enumerate(inputs.items())}
    direction["attention.out"] = np.zeros_like(params["attention.out"])

    def loss(arrays):
        y_BSD = applied(config, backend.ops, "float64", arrays, arrays["x"])
        return backend.ops.sum(y_BSD * backend.ops.from_numpy(out_BSD))

    _, grads = backend.value_and_grad(loss)({name: backend.ops.from_numpy(v) for name, v in inputs.items()})
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = {name: value + sign * step * direction[name] for name, value in inputs.items()}
        y_TD = written_out(config, moved, moved["x"].reshape(-1, config.d_model))
        ends.append((y_TD * out_BSD.reshape(y_TD.shape)).sum())
    got = sum((backend.ops.to_numpy(grads[name]) * direction[name]).sum() for name in inputs)
    assert_close(got, (ends[0] - ends[1]) / (2 * step), 1e-6)
    assert np.abs(backend.ops.to_numpy(grads["dense_norm.weight"])).max() > 1e-3


@every_router
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_counts_are_those_of_the_parameters(router, form):
    config = replace_layers(config_of(form, router), 3)
    specs = DecoderLM(config, VOCABULARY).parameter_specs()
    assert config.parameter_counts(VOCABULARY).total == sum(int(np.prod(spec.shape)) for spec in specs)
    norms = sum(int(np.prod(spec.shape)) for spec in specs if len(spec.shape) == 1) - config.d_model
    counted = config.block_counts.active - config.block_flops_per_token(0) // 6
    assert counted == norms


def replace_layers(config, number):
    return config.model_copy(update={"num_layers": number})


def test_a_form_without_a_dense_block_is_refused():
    with pytest.raises(ConfigError, match=r"places a dense block, but model\.moe\.residual_hidden is 0"):
        config_from_dict({"model": {"moe": {"residual_form": "sequential"}}})
