"""The check itself: what is wrong with a backend is found and said."""

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.conformance.check import CASES, check_gradients, check_values
from moeport.conformance.forms import with_methods

torch = pytest.importorskip("torch")


def case(name):
    return next(case for case in CASES if str(case) == name)


@pytest.fixture
def backend():
    return get_backend(BackendConfig(name="torch", device="cpu"))


def broken(backend, **methods):
    backend.ops = with_methods(backend.ops, "Broken", **methods)
    return backend


def swiglu(change):
    """The kernel with its result changed."""

    def call(self, x):
        half = x.shape[-1] // 2
        return change(torch.nn.functional.silu(x[..., :half]) * x[..., half:])

    return call


FAULTS = {
    "zeros": (lambda y: 0 * y, "12 of 12 values are wrong"),
    "one wrong value": (
        lambda y: y + (torch.arange(12.0).reshape(3, 4) == 5),
        "1 of 12 values are wrong, the worst at (1, 1)",
    ),
    "not a number": (lambda y: torch.where(torch.arange(4) == 2, float("nan"), y), "3 of 12 values are wrong"),
    "another shape": (lambda y: y.T, "shape (4, 3), expected (3, 4)"),
    "another type": (lambda y: y.double(), "type float64, expected float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_value_is_found(backend, fault):
    change, said = FAULTS[fault]
    found = check_values(case("swiglu-x"), broken(backend, swiglu=swiglu(change)))
    assert found.problem.startswith(said.partition(": ")[0]), found.problem
    assert found.nearness > 1
    assert ("all are zeros" in found.problem) == (fault == "zeros")


def test_a_missing_gradient_is_found(backend):
    """As that of an operation without a derivative: the values are right."""
    ops = broken(backend, swiglu=swiglu(lambda y: y.detach()))
    assert check_values(case("swiglu-x"), ops).problem is None
    found = check_gradients(case("swiglu-x"), ops)
    assert found.problem.startswith("by input 0: 24 of 24 values are wrong, the worst at ")
    assert found.problem.endswith("received 0; all are zeros")


def test_indices_must_be_equal(backend):
    def topk_ids(self, x, k):
        return torch.topk(x, k, sorted=False).indices.flip(-1)

    found = check_values(case("topk_ids-2 of ties"), broken(backend, topk_ids=topk_ids))
    assert "values are wrong" in found.problem


def test_how_near_the_limit_a_right_result_is(backend):
    found = check_values(case("swiglu-x"), backend)
    assert found.problem is None
    assert 0 <= found.nearness <= 1
    assert np.isfinite(found.nearness)
