"""Parameters that are cast to the compute type once per update, against a cast at every use."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from moeport.backends.torch.compute_copies import ComputeCopies
from moeport.config.training import OptimizerConfig
from tests.backends.models import assert_same_bits, stepped, training_model
from tests.model.models import ROUTER_CONFIGS, batch_of, model_config, rows


@pytest.fixture
def cast_at_every_use(monkeypatch):
    """Builds a model as if no parameter could be cast once."""

    def build(config, **options):
        original = ComputeCopies.__init__

        def none(self, module, specs, dtype, trains):
            original(self, module, {n: replace(s, in_compute_type=False) for n, s in specs.items()}, dtype, trains)

        with monkeypatch.context() as patch:
            patch.setattr(ComputeCopies, "__init__", none)
            model = training_model(config, "bfloat16", **options)
        assert not model.copies.copies
        return model

    return build


def trained(model):
    """Gradients of a step of two micro-batches, then parameters, moments and an evaluation after another step."""
    batch = batch_of(model.model)
    for number in range(2):
        model.accumulate(rows(batch, 2 * number, 2 * number + 2), 0.5, number == 1)
    gradients = model.gradients()
    model.step(0.01, model.gradient_norm())
    loss = stepped(model, batch).loss.item()
    after = model.evaluate(batch).loss.item()
    return {**gradients, "losses": np.array([loss, after])}, model.parameters(), model.optimizer_state()


@pytest.mark.parametrize("router", ["topk", "sigmoid_bias", "xmoe", "rre"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_cast_per_update_gives_the_bits_of_a_cast_per_use(cast_at_every_use, router, recomputed):
    config = model_config(router, {"residual_hidden": 6, "num_shared_experts": 1}, tie_embeddings=router == "topk")
    options = {"activation_checkpointing": recomputed, "optimizer": OptimizerConfig(clip_norm=1.0)}
    want = trained(cast_at_every_use(config, **options))
    model = training_model(config, "bfloat16", **options)
    assert len(model.copies.copies) >= 12
    for got, wanted in zip(trained(model), want, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("router", sorted(ROUTER_CONFIGS))
def test_what_is_cast_once_is_used_in_the_compute_type_only(router):
    """Rounding it beforehand changes nothing, whereas a gate, a norm or an embedding that is rounded does."""
    model = training_model(model_config(router, {"num_shared_experts": 1}), "bfloat16")
    batch, values = batch_of(model.model), model.parameters()
    want = model.evaluate(batch)

    def rounded(once):
        new = {
            name: torch.tensor(value).bfloat16().float().numpy()
            for name, value in values.items()
            if model.specs[name].trainable and model.specs[name].in_compute_type == once
        }
        model.load_parameters(values | new)
        return model.evaluate(batch)

    assert all(torch.equal(x, y) for x, y in zip(rounded(True).flat(), want.flat(), strict=True))
    assert rounded(False).loss.item() != want.loss.item()


def test_copies_follow_every_change_of_the_parameters():
    model = training_model(model_config(), "bfloat16")
    stepped(model, batch_of(model.model))
    name = "layers.0.attention.q"
    model.load_parameters({name: np.full(model.specs[name].shape, 1 / 3, np.float32)})
    for name, copy in model.copies.copies.items():
        assert torch.equal(copy, model.copies.parameters[name].bfloat16()), name
        assert copy.grad is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_copied_where_parameters_have_the_compute_type(dtype):
    assert not training_model(model_config(), dtype).copies.copies
