"""Small training models on PyTorch."""

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.config.training import BackendConfig, OptimizerConfig
from tests.model.models import changed, model_and_params


def training_model(config, dtype="float32", seed=0, optimizer=None, kernels="auto", **options):
    """A training model on the CPU whose norms and biases are not at their initial values."""
    model, params = model_and_params(config, seed)
    backend = get_backend(BackendConfig(name="torch", device="cpu", dtype=dtype, kernels=kernels))
    return backend.training_model(
        model, changed(params, 50), TrainingOptions(optimizer or OptimizerConfig(), **options)
    )


def stepped(training, batch, learning_rate=0.01):
    """One whole optimiser step; returns its loss terms."""
    terms = training.accumulate(batch, 1.0)
    training.step(learning_rate, training.gradient_norm())
    return terms


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].tobytes()) == (value.dtype, value.tobytes()), name
