"""The image classifier against plain numpy."""

import math

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.conformance import formulas
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.build import build_model
from tests.conformance.targets import COMPOSED, TOLERANCE, parameters
from tests.model.models import changed
from tests.support import assert_close, rng
from tests.vision.tiny import digits_config


def built(tmp_path, **model):
    config = digits_config(tmp_path, model={"num_layers": 2, "d_model": 8, "init_std": 0.5, **model})
    shapes = build_model(config.model, config.data, 0)
    return config.model, shapes, changed(initial_parameters(shapes.parameter_specs(), 0), 7)


def batch_of(images=3):
    return Batch(rng(1).random((images, 4, 16), np.float32), rng(2).integers(0, 10, (images, 1)))


def evaluation(shapes, params):
    return get_backend(BackendConfig(name="numpy", dtype="float64")).evaluation_model(shapes, params)


def reference(config, params, patch_BSP):
    """Class scores (B, C) with one expert, which is a dense block: products, loops, and the mean at the end."""
    heads, width = config.num_heads, config.head_dim
    x = patch_BSP @ params["patch_embedding.weight"].T + params["position_embedding.weight"]
    sequence = x.shape[1]
    angle = np.outer(np.arange(sequence), config.attention.rope_base ** (-np.arange(0, width, 2) / width))
    for layer in range(config.num_layers):
        own = {name.partition(f"layers.{layer}.")[2]: value for name, value in params.items()}
        y = formulas.rms_norm(x, own["attention_norm.weight"], config.norm_eps)
        q, k, v = ((y @ own[f"attention.{n}"].T).reshape(*y.shape[:2], heads, width) for n in "qkv")
        y = formulas.attention(formulas.rope(q, angle), formulas.rope(k, angle), v, causal=False)
        x = x + y.reshape(x.shape) @ own["attention.out"].T
        y = formulas.rms_norm(x, own["mlp_norm.weight"], config.norm_eps)
        x = x + formulas.mlp(y, own["moe.experts.w_in"][0], own["moe.experts.w_out"][0], "swiglu")
    return formulas.rms_norm(x, params["final_norm.weight"], config.norm_eps).mean(1) @ params["class_head.weight"].T


def test_scores_and_loss_are_those_of_the_formula(tmp_path):
    moe = {"num_experts": 1, "expert_hidden": 6, "router": {"name": "topk", "top_k": 1}}
    config, shapes, params = built(tmp_path, moe=moe)
    batch = batch_of()
    exact = {name: value.astype(np.float64) for name, value in params.items()}
    want = reference(config, exact, batch.token_BS.astype(np.float64))
    model = evaluation(shapes, params)
    assert_close(model.logits(batch.token_BS), want, 1e-12)
    nll, _ = formulas.cross_entropy(want, batch.target_BS[:, 0])
    assert_close(model.evaluate(batch).cross_entropy, math.fsum(nll) / len(nll), 1e-12)


@pytest.mark.parametrize(
    ("target", "router"),
    [
        pytest.param(*target.values, router, marks=[*target.marks, *[pytest.mark.slow] * is_slow])
        for target in parameters(COMPOSED)
        for router in ("topk", "expert_choice", "soft", "cartesian", "gshard")
        for is_slow in [target.values[0].static and router != "topk"]  # compiled in tests/backends/test_mindspore.py
    ],
    ids=str,
)
def test_every_target_computes_the_loss_of_numpy(target, router, tmp_path):
    moe = {"num_experts": 4, "expert_hidden": 6, "router": {"name": router}, "num_shared_experts": 1}
    _, shapes, params = built(tmp_path, moe=moe)
    batch, backend = batch_of(), target.build()
    want = evaluation(shapes, params).evaluate(batch)
    got = backend.evaluation_model(shapes, params).evaluate(batch)
    tolerance = 8 * TOLERANCE[target.dtype]
    for name in ("loss", "cross_entropy", "load_balance"):
        assert_close(backend.ops.to_numpy(getattr(got, name)), getattr(want, name), tolerance, name)


def test_every_patch_counts(tmp_path):
    _, shapes, params = built(tmp_path)
    model, batch = evaluation(shapes, params), batch_of()
    before = model.logits(batch.token_BS)
    for patch in range(4):
        moved = batch.token_BS.copy()
        moved[:, patch] += 0.5
        assert (model.logits(moved) != before).any(axis=1).all()


@pytest.mark.parametrize("router", ["topk", "expert_choice", "soft"])
def test_an_image_does_not_depend_on_the_others(tmp_path, router):
    moe = {"num_experts": 4, "expert_hidden": 6, "router": {"name": router}}
    _, shapes, params = built(tmp_path, moe=moe)
    model, batch = evaluation(shapes, params), batch_of()
    assert_close(model.logits(batch.token_BS[:1]), model.logits(batch.token_BS)[:1], 1e-12)


@pytest.mark.parametrize("router", ["topk", "cartesian"])
def test_parameter_counts_are_those_of_the_specs(tmp_path, router):
    moe = {"num_experts": 4, "expert_hidden": 6, "router": {"name": router}, "num_shared_experts": 1}
    config, shapes, _ = built(tmp_path, moe=moe)
    sizes = {spec.name: spec.size for spec in shapes.parameter_specs() if spec.trainable}
    counts = shapes.parameter_counts()
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert counts.total == sum(sizes.values())
    assert counts.active == counts.total - experts * (4 - config.moe.router.experts_per_token) // 4


def test_operations_are_those_of_the_products(tmp_path):
    """6 for each weight that multiplies a token, of the head one in S = 4, and attention over S positions."""
    config, shapes, _ = built(tmp_path)
    sizes = {spec.name: spec.size for spec in shapes.parameter_specs() if len(spec.shape) > 1}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    ends = sizes.pop("position_embedding.weight"), sizes.pop("class_head.weight")
    products = sum(sizes.values()) - experts // 2 + ends[1] // 4
    assert shapes.training_flops_per_token(4) == 6 * products + 12 * config.num_layers * config.d_model * 4
