import functools

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from tests.conformance import kernels, primitives
from tests.conformance.targets import GRADIENT_TOLERANCE, every_form_that_trains
from tests.support import assert_gradient, finite_difference, grid

CASES = [case for case in (*primitives.CASES, *kernels.CASES) if case.variables]


def cotangents(case):
    return [grid(seed, *out.shape) for seed, out in enumerate(case.expected(), start=100)]


@functools.cache
def finite_differences(case):
    """Gradient of the outputs' weighted sum by each variable, from numpy in float64."""

    weights = cotangents(case)

    def total(position, x):
        inputs = [x if i == position else value for i, value in enumerate(case.inputs)]
        return sum(np.sum(out * v) for out, v in zip(case.outputs(NumpyOps(), *inputs), weights, strict=True))

    return {
        position: finite_difference(functools.partial(total, position), case.inputs[position])
        for position in case.variables
    }


def gradients(case, backend):
    """The same from the backend."""
    ops, arguments = backend.ops, case.arguments(backend)
    weights = [ops.from_numpy(v) for v in cotangents(case)]

    def total(params):
        inputs = [params.get(str(i), x) for i, x in enumerate(arguments)]
        terms = [
            ops.sum(ops.cast(out, "float64") * v) for out, v in zip(case.outputs(ops, *inputs), weights, strict=True)
        ]
        return functools.reduce(lambda x, y: x + y, terms)

    _, found = backend.value_and_grad(total)({str(i): arguments[i] for i in case.variables})
    return {int(name): gradient for name, gradient in found.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
@every_form_that_trains
def test_gradient_is_that_of_finite_differences(target, case):
    backend = target.build()
    found = gradients(case, backend)
    assert found.keys() == set(case.variables)
    for position, want in finite_differences(case).items():
        dtype = backend.parameter_dtype if position in case.weights else target.dtype
        assert backend.ops.dtype(found[position]) == dtype
        assert_gradient(backend.ops.to_numpy(found[position]), want, GRADIENT_TOLERANCE[target.dtype], f"by {position}")
