"""Adafactor, against torch.optim.Adafactor on matrices that the test cuts out by itself."""

import numpy as np
import pytest
from rich.console import Console

from moeport.config import config_from_dict
from moeport.config.training import AdafactorConfig, OptimizerConfig
from moeport.core.moments import moment_names
from moeport.errors import ConfigError
from moeport.training.run import train
from tests.backends.models import assert_same_bits, stepped, training_model
from tests.model.models import batch_of, model_config
from tests.training.test_run import contents, last, stop_after
from tests.training.tiny import tiny_config

torch = pytest.importorskip("torch")

QUIET = Console(quiet=True)
RATES = (0.01, 0.02, 0.005)
DEFAULT = OptimizerConfig(name="adafactor", clip_norm=None)
OTHER = OptimizerConfig(
    name="adafactor",
    clip_norm=None,
    weight_decay=0.3,
    adafactor=AdafactorConfig(beta2_decay=0.5, clip_threshold=2.0, eps=1e-4, least_scale=0.1),
)


def matrices_of(name, value):
    """Every matrix of a parameter: each expert, and both halves of SwiGLU's first projection."""
    if value.ndim == 1:
        return [value]
    halves = 2 if name.endswith("w_in") else 1
    experts = value if value.ndim == 3 else value[None]
    return [half for expert in experts for half in np.split(expert, halves)]


def library(value, decays, config):
    """A parameter of its own, and PyTorch's optimiser of it."""
    options, p = config.adafactor, torch.nn.Parameter(torch.from_numpy(value.copy()))
    return p, torch.optim.Adafactor(
        [p],
        beta2_decay=-options.beta2_decay,
        eps=(options.eps, options.least_scale),
        d=options.clip_threshold,
        weight_decay=config.weight_decay if decays else 0.0,
    )


@pytest.mark.parametrize("config", [DEFAULT, OTHER], ids=["defaults", "other numbers"])
def test_steps_are_those_of_the_library_on_each_matrix(config):
    training = training_model(model_config("sigmoid_bias"), optimizer=config)
    trained = {spec.name for spec in training.model.parameter_specs() if spec.trainable}
    params = {name: value for name, value in training.parameters().items() if name in trained}
    others = {
        name: [library(x, value.ndim > 1, config) for x in matrices_of(name, value)] for name, value in params.items()
    }
    batch = batch_of(training.model)
    for rate in RATES:
        training.accumulate(batch, 1.0)
        gradients = training.gradients()
        training.step(rate, training.gradient_norm())
        for name, pairs in others.items():
            for (p, optimizer), gradient in zip(pairs, matrices_of(name, gradients[name]), strict=True):
                p.grad = torch.from_numpy(gradient.copy())
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
    got, state = training.parameters(), training.optimizer_state()
    assert len(others["layers.0.moe.experts.w_in"]) == 2 * training.model.config.moe.num_experts
    for name, pairs in others.items():
        for (p, _), x in zip(pairs, matrices_of(name, got[name]), strict=True):
            np.testing.assert_array_equal(x, p.detach().numpy(), name)
        for moment in ("variance",) if params[name].ndim == 1 else ("row_var", "col_var"):
            kept = [optimizer.state[p][moment].numpy().ravel() for p, optimizer in pairs]
            np.testing.assert_array_equal(state[f"{moment}.{name}"].ravel(), np.concatenate(kept), name)


def test_state_has_the_shapes_that_checkpoints_expect():
    training = training_model(model_config(), optimizer=DEFAULT)
    assert training.optimizer_state() == {}
    stepped(training, batch_of(training.model))
    expected = moment_names(training.model.parameter_specs(), "adafactor")
    found = {name: value.shape for name, value in training.optimizer_state().items()}
    assert found == {name: spec.shape for name, spec in expected.items()}
    written = {shard.name: shard for shard in training.optimizer_shards()}
    assert {name: shard.array.shape for name, shard in written.items()} == found


def test_a_restored_model_makes_the_same_next_step_bit_for_bit():
    config = model_config()
    first = training_model(config, optimizer=OTHER)
    batches = [batch_of(first.model, seed=seed) for seed in range(3)]
    for batch in batches[:2]:
        stepped(first, batch)
    second = training_model(config, seed=9, optimizer=OTHER)
    second.load_parameters(first.parameters())
    second.load_optimizer_state(first.optimizer_state(), steps=2)
    for training in (first, second):
        stepped(training, batches[2])
    assert_same_bits(second.parameters(), first.parameters())
    assert_same_bits(second.optimizer_state(), first.optimizer_state())


def test_mindspore_has_none():
    with pytest.raises(ConfigError, match=r"optimizer\.name: backend mindspore updates pieces of parameters.*adamw or"):
        config_from_dict({"optimizer": {"name": "adafactor"}, "backend": {"name": "mindspore"}})


def test_a_run_resumes_exactly(tmp_path):
    config = tiny_config(
        tmp_path,
        optimizer={"name": "adafactor", "learning_rate": 0.05, "schedule": {"name": "inverse_sqrt", "warmup_steps": 2}},
    )
    train(config, console=QUIET)
    whole = contents(last(config))
    stop_after(config, 4)
    train(config, resume=True, console=QUIET)
    assert contents(last(config)) == whole
