import numpy as np
import pytest
import torch

from tests.backends.models import training_model
from tests.model.models import batch_of, model_config


def planted(name, value):
    """A training model and its batch, with one number of a parameter replaced."""
    training = training_model(model_config("sigmoid_bias"))
    parameter = training.parameters([name])[name]
    parameter.reshape(-1)[-1] = value
    training.load_parameters({name: parameter})
    return training, batch_of(training.model)


def test_nothing_is_found_where_all_is_finite():
    training = training_model(model_config())
    batch = batch_of(training.model)
    assert training.first_non_finite(batch) is None
    training.accumulate(batch, 1.0)
    assert training.first_non_finite(batch) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embedding.weight", "layers.1.attention.q", "layers.1.moe.router.bias"])
def test_a_parameter_is_named(name, value):
    training, batch = planted(name, value)
    assert training.first_non_finite(batch) == f"parameter {name}"


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_block_that_overflows_is_named(layer):
    training, batch = planted("final_norm.weight", 1.0)
    for later in range(layer, 2):
        name = f"layers.{later}.moe.experts.w_out"
        training.load_parameters({name: np.full_like(training.parameters([name])[name], 3e38)})
    assert training.first_non_finite(batch) == f"output of layers.{layer}"


def test_a_loss_is_named():
    training, batch = planted("lm_head.weight", 0.0)
    huge = np.full_like(training.parameters(["lm_head.weight"])["lm_head.weight"], 3e38)
    training.load_parameters({"lm_head.weight": huge})
    assert training.first_non_finite(batch) == "cross_entropy"


def test_a_loss_that_overflows_alone_is_named():
    """Logits of 1e20 have a finite cross entropy; their square is beyond float32."""
    training, batch = planted("lm_head.weight", 0.0)
    weight = training.parameters(["lm_head.weight"])["lm_head.weight"]
    training.load_parameters({"lm_head.weight": weight * np.float32(1e20)})
    assert training.first_non_finite(batch) == "output_z"


@pytest.mark.parametrize("name", ["embedding.weight", "layers.1.moe.experts.w_in", "lm_head.weight"])
def test_a_gradient_is_named(name):
    training = training_model(model_config())
    batch = batch_of(training.model)
    training.accumulate(batch, 1.0)
    with torch.no_grad():
        training.module.get_parameter(name).grad.view(-1)[0] = float("nan")
    assert training.first_non_finite(batch) == f"gradient of {name}"
