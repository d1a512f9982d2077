"""Conversion, constants and differentiation."""

import numpy as np
import pytest

from moeport.errors import BackendUnavailableError
from tests.conformance.targets import TARGETS, every_form, every_form_that_trains
from tests.support import grid

INTEGERS = ("int8", "uint8", "int32", "int64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_form
def test_floats_survive_the_round_trip(target, dtype):
    ops, x = target.build().ops, np.random.default_rng(0).standard_normal((3, 4)).astype(dtype)
    y = ops.from_numpy(x)
    back = ops.to_numpy(y)
    assert (ops.dtype(y), back.dtype, back.tolist()) == (dtype, x.dtype, x.tolist())


@pytest.mark.parametrize("dtype", INTEGERS)
@every_form
def test_integers_become_the_index_type(target, dtype):
    ops = target.build().ops
    x = ops.from_numpy(np.array([[0, 5], [127, 1]], dtype))
    assert ops.dtype(x) == ops.dtype(ops.arange(1))
    assert ops.to_numpy(x).tolist() == [[0, 5], [127, 1]]


@every_form
def test_from_numpy_copies(target):
    ops, x = target.build().ops, np.zeros(3)
    y = ops.from_numpy(x)
    x[0] = 1.0
    assert ops.to_numpy(y).tolist() == [0.0, 0.0, 0.0]


@every_form
def test_to_numpy_copies(target):
    ops = target.build().ops
    x = ops.zeros((3,), target.dtype)
    ops.to_numpy(x)[:] = 1.0
    assert ops.to_numpy(x).tolist() == [0.0, 0.0, 0.0]


@every_form
def test_read_only_arrays_are_taken(target):
    ops, x = target.build().ops, np.arange(3)
    x.setflags(write=False)
    assert ops.to_numpy(ops.from_numpy(x)).tolist() == [0, 1, 2]


@every_form
def test_compute_type_has_its_name_and_accurate_form(target):
    ops = target.build().ops
    x = ops.zeros((2,), target.dtype)
    assert ops.dtype(x) == target.dtype
    assert ops.dtype(ops.accurate(x)) == ("float32" if target.dtype == "bfloat16" else target.dtype)
    assert ops.dtype(x > ops.constant_like(0.0, x)) == "bool"


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-300])
@every_form
def test_constants_are_exact_in_float64(target, value):
    ops, x = target.build().ops, np.random.default_rng(0).standard_normal(8)
    for constant in (ops.constant(value, "float64"), ops.constant_like(value, ops.from_numpy(x))):
        assert ops.to_numpy(ops.from_numpy(x) * constant).tolist() == (x * value).tolist()


@every_form
def test_constants_do_not_widen_arrays(target):
    ops = target.build().ops
    x = ops.zeros((2,), target.dtype)
    assert ops.dtype(x * ops.constant_like(0.1, x) + ops.constant(0.1, target.dtype)) == target.dtype


def square(ops):
    def fn(params, factor):
        return ops.sum(params["x"] * params["x"] * factor)

    return fn


def params_of(backend):
    ops = backend.ops
    return {name: ops.cast(ops.from_numpy(grid(seed, 3)), backend.parameter_dtype) for seed, name in enumerate("xy")}


@every_form_that_trains
def test_value_and_gradient(target):
    backend = target.build()
    params, ops = params_of(backend), backend.ops
    factor = ops.cast(ops.from_numpy(np.array([1.0, 2.0, 4.0])), backend.parameter_dtype)
    loss, grads = backend.value_and_grad(square(ops))(params, factor)
    x = grid(0, 3)
    assert ops.to_numpy(loss) == (x * x * [1, 2, 4]).sum()
    assert ops.to_numpy(grads["x"]).tolist() == (2 * x * [1, 2, 4]).tolist()
    assert ops.to_numpy(grads["y"]).tolist() == [0.0, 0.0, 0.0]


@every_form_that_trains
def test_auxiliary_results_are_passed_through(target):
    backend = target.build()
    ops, params = backend.ops, params_of(backend)

    def fn(params):
        return ops.sum(params["x"]), {"doubled": params["y"] + params["y"]}

    (loss, aux), grads = backend.value_and_grad(fn, has_aux=True)(params)
    assert ops.to_numpy(loss) == grid(0, 3).sum()
    assert ops.to_numpy(aux["doubled"]).tolist() == (2 * grid(1, 3)).tolist()
    assert ops.to_numpy(grads["x"]).tolist() == [1.0, 1.0, 1.0]


@every_form_that_trains
def test_a_loss_without_parameters_has_gradients_of_zeros(target):
    backend = target.build()
    ops = backend.ops
    _, grads = backend.value_and_grad(lambda params: ops.sum(ops.stop_gradient(params["x"])))(params_of(backend))
    assert {name: ops.to_numpy(grad).tolist() for name, grad in grads.items()} == {"x": [0.0] * 3, "y": [0.0] * 3}


@every_form_that_trains
def test_reported_cross_entropy_and_z_loss_carry_no_gradient(target):
    backend = target.build()
    ops, params = backend.ops, params_of(backend)
    targets = ops.from_numpy(np.array([1]))

    def total(params):
        x_TD, weight_VD = (ops.reshape(params[name], shape) for name, shape in (("x", (1, 3)), ("y", (3, 1))))
        _, cross_entropy, z = ops.linear_cross_entropy(x_TD, ops.matmul(weight_VD, x_TD), targets, 0.5)
        return cross_entropy + z

    _, grads = backend.value_and_grad(total)(params)
    assert {name: ops.to_numpy(grad).tolist() for name, grad in grads.items()} == {"x": [0.0] * 3, "y": [0.0] * 3}


@every_form_that_trains
def test_stop_gradient_is_a_constant_of_differentiation(target):
    backend = target.build()
    ops, params = backend.ops, params_of(backend)
    _, grads = backend.value_and_grad(lambda params: ops.sum(ops.stop_gradient(params["x"]) * params["x"]))(params)
    assert ops.to_numpy(grads["x"]).tolist() == grid(0, 3).tolist()


def test_the_reference_refuses_to_differentiate():
    backend = next(target for target in TARGETS if target.backend == "numpy").build()
    with pytest.raises(BackendUnavailableError) as caught:
        backend.value_and_grad(lambda params: params["x"])
    assert str(caught.value) == (
        "backend.name: numpy computes forward only and cannot train; "
        "use it for evaluation and parity, and train with backend.name: torch"
    )
