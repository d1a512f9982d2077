"""`unit`: the normalisation of vectors, at and near zero."""

import numpy as np
import pytest

from moeport.routers.base import SHORTEST, unit
from tests.conformance.targets import TOLERANCE, every_accurate_training_target, every_target
from tests.support import assert_close, rng

LENGTHS = (0.0, 1e-30, 1e-9, 0.5 * SHORTEST, 2 * SHORTEST, 1.0, 1e6)
DIRECTIONS = rng(1).standard_normal((len(LENGTHS), 16))
VECTORS = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1, keepdims=True) * np.array(LENGTHS)[:, None]


@every_target
def test_a_vector_has_length_one_or_is_too_short_for_it(target):
    ops = target.build().ops
    kind = "float64" if target.dtype == "float64" else "float32"
    got = ops.to_numpy(unit(ops, ops.cast(ops.from_numpy(VECTORS), kind)))
    assert_close(got, VECTORS / np.maximum(LENGTHS, SHORTEST)[:, None], 4 * TOLERANCE[kind])
    assert (got[0] == 0).all()


@every_accurate_training_target
def test_gradients_are_bounded_at_zero_and_those_of_torch_elsewhere(target):
    """torch.nn.functional.normalize divides by the length or its eps too."""
    torch = pytest.importorskip("torch")
    backend = target.build()
    ops, out = backend.ops, rng(2).standard_normal(VECTORS.shape)
    x = torch.tensor(VECTORS, requires_grad=True)
    (torch.nn.functional.normalize(x, dim=-1, eps=SHORTEST) * torch.tensor(out)).sum().backward()
    place = {"x": ops.cast(ops.from_numpy(VECTORS), backend.dtype)}
    weight = ops.cast(ops.from_numpy(out), backend.dtype)
    _, grads = backend.value_and_grad(lambda arrays: ops.sum(unit(ops, arrays["x"]) * weight))(place)
    got = ops.to_numpy(grads["x"])
    assert (np.linalg.norm(got, axis=1) <= 1.001 * np.linalg.norm(out, axis=1) / SHORTEST).all()
    lengths = np.linalg.norm(x.grad.numpy(), axis=1, keepdims=True)
    assert_close(got / lengths, x.grad.numpy() / lengths, 100 * TOLERANCE[backend.dtype])
