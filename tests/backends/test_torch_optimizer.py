import numpy as np
import pytest

from moeport.config.training import OptimizerConfig
from tests.backends.models import assert_same_bits, stepped, training_model
from tests.model.models import batch_of, model_config
from tests.support import assert_close

TOLERANCE = {"float64": 1e-13, "float32": 2e-6}
RATES = (0.01, 0.02, 0.005)


class Formula:
    """AdamW with decoupled decay (Loshchilov and Hutter, Algorithm 2) in numpy float64."""

    def __init__(self, params, config):
        self.params = {name: value.astype(np.float64) for name, value in params.items()}
        self.config, self.steps = config, 0
        self.first = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.second = {name: np.zeros_like(value) for name, value in self.params.items()}

    def step(self, gradients, learning_rate):
        config, self.steps = self.config, self.steps + 1
        for name, gradient in gradients.items():
            g = gradient.astype(np.float64)
            self.first[name] = config.beta1 * self.first[name] + (1 - config.beta1) * g
            self.second[name] = config.beta2 * self.second[name] + (1 - config.beta2) * g**2
            m = self.first[name] / (1 - config.beta1**self.steps)
            v = self.second[name] / (1 - config.beta2**self.steps)
            decay = config.weight_decay if self.params[name].ndim >= 2 else 0.0
            self.params[name] -= learning_rate * (m / (np.sqrt(v) + config.eps) + decay * self.params[name])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(clip_norm=None),
        OptimizerConfig(clip_norm=None, beta1=0.0, beta2=0.5, eps=1e-3, weight_decay=0.5),
    ],
    ids=["defaults", "other numbers"],
)
def test_steps_are_those_of_the_formula(dtype, config):
    training = training_model(model_config("sigmoid_bias"), dtype, optimizer=config)
    formula = Formula(training.parameters(), config)
    batch = batch_of(training.model)
    for learning_rate in RATES:
        training.accumulate(batch, 1.0)
        formula.step(training.gradients(), learning_rate)
        training.step(learning_rate, training.gradient_norm())
    got, state = training.parameters(), training.optimizer_state()
    for name, want in formula.params.items():
        assert_close(got[name], want, TOLERANCE[dtype], name)
        if not name.endswith("router.bias"):
            assert_close(state[f"exp_avg.{name}"], formula.first[name], 10 * TOLERANCE[dtype], name)
            assert_close(state[f"exp_avg_sq.{name}"], formula.second[name], 10 * TOLERANCE[dtype], name)


def test_vectors_do_not_decay_and_matrices_do():
    """With next to no gradient step (a huge eps) only the decay is left."""
    training = training_model(model_config(), "float64", optimizer=OptimizerConfig(eps=1e12, weight_decay=0.5))
    before = training.parameters()
    stepped(training, batch_of(training.model), learning_rate=0.1)
    for name, value in training.parameters().items():
        factor = 0.95 if before[name].ndim >= 2 else 1.0
        assert_close(value, before[name] * factor, 1e-9, name)


def test_gradient_norm_is_the_two_norm_of_all():
    training = training_model(model_config(), "float64")
    training.accumulate(batch_of(training.model), 1.0)
    want = np.sqrt(sum((gradient**2).sum() for gradient in training.gradients().values()))
    assert_close(training.gradient_norm().item(), want, 1e-13)


def first_moments(clip_norm):
    """Norm before the step, the gradients, and the gradients that the optimiser saw: a tenth is the first moment."""
    training = training_model(model_config(), "float64", optimizer=OptimizerConfig(clip_norm=clip_norm))
    training.accumulate(batch_of(training.model), 1.0)
    gradients, norm = training.gradients(), training.gradient_norm()
    training.step(0.01, norm)
    state = training.optimizer_state()
    return norm.item(), gradients, {name: state[f"exp_avg.{name}"] / 0.1 for name in gradients}


def test_clipping_scales_all_gradients_to_the_norm():
    norm, gradients, seen = first_moments(clip_norm=0.25)
    assert norm > 0.25
    for name, gradient in gradients.items():
        assert_close(seen[name], gradient * (0.25 / norm), 5e-6, name)


@pytest.mark.parametrize("clip_norm", [1e6, None])
def test_gradients_below_the_norm_are_not_scaled(clip_norm):
    _, gradients, seen = first_moments(clip_norm)
    for name, gradient in gradients.items():
        assert_close(seen[name], gradient, 1e-15, name)


def test_a_step_clears_the_gradients():
    training = training_model(model_config())
    stepped(training, batch_of(training.model))
    assert training.gradients() == {}


def test_there_is_no_state_before_the_first_step():
    assert training_model(model_config()).optimizer_state() == {}


def test_state_covers_the_trained_parameters():
    training = training_model(model_config("sigmoid_bias"))
    stepped(training, batch_of(training.model))
    trained = [spec.name for spec in training.model.parameter_specs() if spec.trainable]
    assert training.optimizer_state().keys() == {
        f"{moment}.{name}" for name in trained for moment in ("exp_avg", "exp_avg_sq")
    }
    assert training.gradients() == {}


@pytest.mark.parametrize("router", ["topk", "sigmoid_bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_model_makes_the_same_next_step_bit_for_bit(dtype, router):
    config = model_config(router)
    first = training_model(config, dtype)
    batches = [batch_of(first.model, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        stepped(first, batch)
    second = training_model(config, dtype, seed=9)
    second.load_parameters(first.parameters())
    second.load_optimizer_state(first.optimizer_state(), steps=2)
    for batch in batches[2:]:
        losses = [stepped(training, batch).loss.item() for training in (first, second)]
        assert losses[0] == losses[1]
    assert_same_bits(second.parameters(), first.parameters())
    assert_same_bits(second.optimizer_state(), first.optimizer_state())


def test_a_wrong_step_count_would_show():
    """The restored state must carry the number of steps: bias correction depends on it."""
    config = model_config()
    first = training_model(config)
    batch = batch_of(first.model)
    stepped(first, batch)
    second = training_model(config)
    second.load_parameters(first.parameters())
    second.load_optimizer_state(first.optimizer_state(), steps=7)
    stepped(first, batch)
    stepped(second, batch)
    name = "final_norm.weight"
    assert second.parameters()[name].tolist() != first.parameters()[name].tolist()


def test_reading_state_gives_copies():
    training = training_model(model_config())
    stepped(training, batch_of(training.model))
    for values in (training.parameters(), training.optimizer_state()):
        for value in values.values():
            value[:] = np.nan
    assert all(np.isfinite(value).all() for value in training.parameters().values())
    assert all(np.isfinite(value).all() for value in training.optimizer_state().values())
