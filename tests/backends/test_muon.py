import math

import numpy as np
import pytest

from moeport.config.training import MuonConfig, OptimizerConfig
from moeport.core.moments import moment_names, rule_of
from moeport.core.muon import batch_shape, rate_factor
from moeport.core.parameters import ParameterSpec
from tests.backends.models import assert_same_bits, stepped, training_model
from tests.backends.test_torch_optimizer import Formula as AdamWFormula
from tests.model.models import batch_of, model_config
from tests.support import assert_close

TOLERANCE = {"float64": 1e-12, "float32": 5e-6}
RATES = (0.01, 0.02, 0.005)
OTHER = OptimizerConfig(
    name="muon",
    clip_norm=None,
    weight_decay=0.3,
    muon=MuonConfig(momentum=0.8, nesterov=False, adjust_rate="original", adamw_learning_rate=3e-3),
)
CONFIGS = [OptimizerConfig(name="muon", clip_norm=None), OTHER]


def orthogonalized(matrix):
    """Five iterations on one matrix, in numpy float64, after the post of Jordan et al."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(np.linalg.norm(x), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Formula:
    """Muon in numpy float64, matrix by matrix: names, and not shapes, say what is a matrix of it."""

    def __init__(self, params, config):
        self.config = config
        self.params = {name: value.astype(np.float64) for name, value in params.items() if is_muons(name)}
        self.momentum = {name: np.zeros_like(value) for name, value in self.params.items()}
        rest = {name: value for name, value in params.items() if not is_muons(name)}
        self.adamw, self.share = AdamWFormula(rest, config), 1.0
        if config.muon.adamw_learning_rate:
            self.share = config.muon.adamw_learning_rate / config.learning_rate

    def step(self, gradients, learning_rate):
        muon = self.config.muon
        self.adamw.step({name: g for name, g in gradients.items() if not is_muons(name)}, learning_rate * self.share)
        for name, value in self.params.items():
            g = gradients[name].astype(np.float64)
            m = self.momentum[name] = muon.momentum * self.momentum[name] + (1 - muon.momentum) * g
            direction = muon.momentum * m + (1 - muon.momentum) * g if muon.nesterov else m
            halves = 2 if name.endswith("w_in") else 1
            parts = direction.reshape(-1, value.shape[-2] // halves, value.shape[-1])
            rows, columns = parts.shape[1:]
            factor = 0.2 * math.sqrt(max(rows, columns))
            if muon.adjust_rate == "original":
                factor = math.sqrt(max(1, rows / columns))
            update = np.stack([orthogonalized(part) for part in parts]).reshape(value.shape) * factor
            self.params[name] = value * (1 - learning_rate * self.config.weight_decay) - learning_rate * update


def is_muons(name):
    return name.endswith(("attention.q", "attention.k", "attention.v", "attention.out", "w_in", "w_out"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "other numbers"])
def test_steps_are_those_of_the_formula(dtype, config):
    training = training_model(model_config("sigmoid_bias"), dtype, optimizer=config)
    formula = Formula(training.parameters(), config)
    batch = batch_of(training.model)
    for learning_rate in RATES:
        training.accumulate(batch, 1.0)
        formula.step(training.gradients(), learning_rate)
        training.step(learning_rate, training.gradient_norm())
    got, state = training.parameters(), training.optimizer_state()
    for name, want in (formula.params | formula.adamw.params).items():
        assert_close(got[name], want, 10 * TOLERANCE[dtype], name)
    for name, want in formula.momentum.items():
        assert_close(state[f"momentum_buffer.{name}"], want, 10 * TOLERANCE[dtype], name)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_iterations_on_one_matrix_are_those_of_torch(shape):
    torch = pytest.importorskip("torch")
    from moeport.backends.torch.muon import orthogonalized as ours

    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = gradient.clone()
    torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
    factor = rate_factor(shape[0], shape[1], "match_rms_adamw")
    wanted = ours(gradient.bfloat16()[None])[0].float() * -factor
    assert_close(p.detach().numpy(), wanted.numpy(), 0.03 * factor, shape)
    exact = ours(gradient.double()[None])[0].numpy()
    assert_close(exact, orthogonalized(gradient.double().numpy()), 1e-12, shape)
    values = np.linalg.svd(exact, compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_factors_and_shapes():
    assert rate_factor(8, 2, "original") == 2.0
    assert rate_factor(2, 8, "original") == 1.0
    assert rate_factor(4, 100, "match_rms_adamw") == pytest.approx(2.0)
    spec = ParameterSpec("experts.w_in", (6, 8, 4), matrices=2)
    assert batch_shape(spec, (3, 8, 4)) == (6, 4, 4)
    assert batch_shape(ParameterSpec("q", (8, 4), matrices=1), (8, 4)) == (1, 8, 4)


@pytest.mark.parametrize("router", ["topk", "sigmoid_bias", "xmoe"])
def test_matrices_are_those_between_hidden_states(router):
    training = training_model(model_config(router))
    specs = training.model.parameter_specs()
    for spec in specs:
        assert rule_of(spec, "muon") == ("muon" if is_muons(spec.name) else "adamw"), spec.name
        assert rule_of(spec, "adamw") == "adamw"


def test_an_expert_without_tokens_only_decays():
    training = training_model(model_config(), "float64", optimizer=OTHER)
    batch, before = batch_of(training.model), training.parameters()
    training.accumulate(batch, 1.0)
    name = "layers.0.moe.experts.w_in"
    dict(training.module.named_parameters())[name].grad[1] = 0
    training.step(0.01, training.gradient_norm())
    after = training.parameters()[name]
    assert_close(after[1], before[name][1] * (1 - 0.01 * 0.3), 1e-15)
    assert np.abs(after[0] - before[name][0] * (1 - 0.01 * 0.3)).max() > 1e-3


def test_state_has_one_moment_of_a_matrix():
    training = training_model(model_config("sigmoid_bias"), optimizer=CONFIGS[0])
    assert training.optimizer_state() == {}
    stepped(training, batch_of(training.model))
    state = training.optimizer_state()
    assert state.keys() == moment_names(training.model.parameter_specs(), "muon").keys()
    assert {name for name in state if name.startswith("momentum_buffer.")} == {
        f"momentum_buffer.{name}" for name in training.parameters() if is_muons(name)
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_model_makes_the_same_next_step_bit_for_bit(dtype):
    config = model_config()
    first = training_model(config, dtype, optimizer=CONFIGS[0])
    batches = [batch_of(first.model, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        stepped(first, batch)
    second = training_model(config, dtype, seed=9, optimizer=CONFIGS[0])
    second.load_parameters(first.parameters())
    second.load_optimizer_state(first.optimizer_state(), steps=2)
    for batch in batches[2:]:
        losses = [stepped(training, batch).loss.item() for training in (first, second)]
        assert losses[0] == losses[1]
    assert_same_bits(second.parameters(), first.parameters())
    assert_same_bits(second.optimizer_state(), first.optimizer_state())
