"""The comparisons that other tests rest on."""

import sys

import numpy as np
import pytest

import moeport.backends.torch
import moeport.backends.torch.placing
from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError
from tests.support import assert_gradient, finite_difference, hide_framework, rng, sampled

X, W = rng(0).standard_normal((5, 4)), rng(1).standard_normal((5, 4))


def softmax(x):
    z = np.exp(x - x.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def gradient(sharpness):
    p = softmax(sharpness * X)
    return sharpness * p * (W - (W * p).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_gradient_is_told_from_one_that_is_a_millionth_off(sharpness, offset):
    """Also where the function is much larger than what it changes by."""
    slopes = finite_difference(lambda x: offset + np.sum(softmax(sharpness * x) * W), X)
    exact = gradient(sharpness)
    assert_gradient(exact, slopes, 1e-12)
    place = np.unravel_index(np.abs(exact).argmax(), exact.shape)
    wrong = exact.copy()
    wrong[place] *= 1 + 1e-6
    with pytest.raises(AssertionError, match="off by"):
        assert_gradient(wrong, slopes, 1e-12)


def test_the_error_of_finite_differences_is_not_far_below_its_limit():
    slopes = finite_difference(lambda x: np.sum(softmax(10 * x) * W), X)
    share = np.max(np.abs(gradient(10.0) - slopes.value) / slopes.error)
    assert 1e-4 < share < 0.3


def test_a_kink_is_refused():
    with pytest.raises(AssertionError, match="a kink"):
        finite_difference(lambda x: np.abs(x).sum(), np.array([1.0, 2.0**-15]))


def test_float32_may_be_off_by_what_cancels_in_it():
    x = np.array([0.5, 1.0])
    slopes = finite_difference(lambda x: 1.0 + 1e-3 * x.sum(), x)
    close = np.full(2, 1e-3 + 1e-7, np.float32)
    assert_gradient(close, slopes, 5e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_gradient(close + np.float32(1e-6), slopes, 5e-6)


def test_a_framework_that_was_hidden_is_back_with_all_of_its_parts():
    package = moeport.backends.torch
    with pytest.MonkeyPatch.context() as patch:
        hide_framework(patch, "torch")
        with pytest.raises(BackendUnavailableError):
            get_backend(BackendConfig(name="torch"))
    assert moeport.backends.torch is sys.modules["moeport.backends.torch"] is package
    assert moeport.backends.torch.placing is sys.modules["moeport.backends.torch.placing"]


@pytest.mark.parametrize("shape", [(12, 16), (8, 16), (5, 4), (1, 3)])
def test_sampled_places_are_in_every_row_and_column(shape):
    chosen = sampled(shape)
    assert chosen.any(1).all()
    assert min(shape) < 3 or chosen.any(0).all()
    assert chosen.sum() == pytest.approx(chosen.size / 3, abs=1)
