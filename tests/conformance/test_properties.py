"""What must hold of the kernels beside their values on a few numbers."""

import numpy as np
import pytest

from moeport.conformance import formulas
from moeport.conformance.case import dispatch_plan
from moeport.model.rope import rope_tables
from tests.conformance.targets import TOLERANCE, every_form, every_form_that_trains
from tests.support import assert_close, grid


def placed(backend, x):
    return backend.ops.cast(backend.ops.from_numpy(x), backend.dtype)


@pytest.mark.parametrize("position", [1, 3])
@every_form
def test_attention_does_not_see_the_future(target, position):
    backend = target.build()
    ops, arrays = backend.ops, [grid(seed, 1, 4, 2, 4) for seed in range(3)]
    before = ops.to_numpy(ops.attention(*(placed(backend, x) for x in arrays)))
    for x in arrays:
        x[:, position:] += 1.0
    after = ops.to_numpy(ops.attention(*(placed(backend, x) for x in arrays)))
    assert after[:, :position].tolist() == before[:, :position].tolist()
    assert (after[:, position:] != before[:, position:]).all()


@every_form
def test_rope_leaves_the_first_position_alone(target):
    backend = target.build()
    ops, x = backend.ops, grid(0, 2, 3, 2, 4)
    rotated = ops.rope(placed(backend, x), *map(ops.from_numpy, rope_tables(3, 4, 10000.0)))
    assert ops.to_numpy(rotated)[:, 0].tolist() == x[:, 0].tolist()


@every_form
def test_rope_products_depend_on_the_distance_alone(target):
    backend = target.build()
    ops, length = backend.ops, 6
    q, k = (np.broadcast_to(grid(seed, 1, 1, 1, 8), (1, length, 1, 8)) for seed in range(2))
    tables = [ops.from_numpy(table) for table in rope_tables(length, 8, 100.0)]
    q, k = (ops.to_numpy(ops.rope(placed(backend, x), *tables))[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(length):
        along = np.diagonal(scores, -distance)
        assert_close(along, np.full_like(along, along[0]), 4 * TOLERANCE[target.dtype])
    assert abs(scores[1, 0] - scores[2, 0]) > 0.1


@every_form
def test_rms_norm_rounds_once(target):
    """In bfloat16 the result is the exact one to half a unit in the last place: sums are kept in float32."""
    backend = target.build()
    ops, x, weight = backend.ops, grid(0, 4, 512) * np.exp2(np.arange(4))[:, None], grid(1, 512)
    got = ops.to_numpy(ops.rms_norm(placed(backend, x), ops.from_numpy(weight.astype(np.float32)), 1e-5))
    unit = {"bfloat16": 2**-8 + 1e-6, "float32": 1e-6, "float64": 1e-14}[target.dtype]
    np.testing.assert_allclose(got, formulas.rms_norm(x, weight, 1e-5), rtol=unit, atol=0)


@every_form_that_trains
def test_cross_entropy_of_huge_logits_is_finite(target):
    backend = target.build()
    ops, logits = backend.ops, np.array([[10240.0, 0.0, -10240.0], [-10240.0, 10240.0, 10240.0]])

    def total(params):
        nll_T, log_partition_T = ops.cross_entropy(params["logits"], ops.from_numpy(np.array([1, 2])))
        return ops.sum(nll_T), (nll_T, log_partition_T)

    (_, terms), grads = backend.value_and_grad(total, has_aux=True)({"logits": placed(backend, logits)})
    nll_T, log_partition_T = map(ops.to_numpy, terms)
    accurate = "float64" if target.dtype == "float64" else "float32"
    tolerance, rounding = TOLERANCE[accurate], 10240 * np.finfo(accurate).eps
    assert_close(nll_T, [10240.0, np.log(2)], tolerance)
    assert_close(log_partition_T, [10240.0, 10240.0 + np.log(2)], tolerance)
    assert_close(ops.to_numpy(grads["logits"]), [[1, -1, 0], [0, 0.5, -0.5]], max(rounding, TOLERANCE[target.dtype]))


@every_form
def test_cross_entropy_is_in_float32_at_least(target):
    """A bfloat16 sum of 1024 ones would stop at 256."""
    backend = target.build()
    ops, logits = backend.ops, np.zeros((1, 1024))
    nll_T, _ = ops.cross_entropy(placed(backend, logits), ops.from_numpy(np.array([3])))
    np.testing.assert_allclose(ops.to_numpy(nll_T), [np.log(1024)], rtol=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0, 0], [0, 3, 0]])
@every_form_that_trains
def test_rows_of_nobody_are_exactly_zero(target, activation, counts):
    backend = target.build()
    ops, width = backend.ops, 6 if activation == "swiglu" else 3
    weights = [ops.cast(ops.from_numpy(grid(1, 3, *shape)), backend.parameter_dtype) for shape in ((width, 4), (4, 3))]

    def total(params):
        out = ops.grouped_mlp(
            params["x"], params["w_in"], params["w_out"], ops.from_numpy(np.array(counts)), activation
        )
        return ops.sum(out * out + out), out

    params = {"x": placed(backend, grid(0, 7, 4)), "w_in": weights[0], "w_out": weights[1]}
    (_, out), grads = backend.value_and_grad(total, has_aux=True)(params)
    served = sum(counts)
    for rows in (ops.to_numpy(out), ops.to_numpy(grads["x"])):
        assert (rows[served:] == 0).all()
        assert (rows[:served] != 0).any(axis=1).all()
    for name in ("w_in", "w_out"):
        by_expert = ops.to_numpy(grads[name]).reshape(3, -1)
        assert [bool(gradient.any()) for gradient in by_expert] == [count > 0 for count in counts]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@every_form_that_trains
def test_a_token_without_a_served_assignment_gets_exactly_zero(target, activation):
    backend = target.build()
    ops, width = backend.ops, 6 if activation == "swiglu" else 3
    plan = dispatch_plan(ops, ops.from_numpy(np.array([1, 2, 2, 2])), 2, 2)
    weights = {"gates": np.array([0.5, 0.0, 0.0, 0.0]), "w_in": grid(1, 2, width, 4), "w_out": grid(2, 2, 4, 3)}

    def total(params):
        x, *rest = (params[name] for name in ("x", "gates", "w_in", "w_out"))
        out = ops.routed_mlp(x, rest[0], plan, *rest[1:], activation)
        return ops.sum(out), out

    params = {name: ops.cast(ops.from_numpy(x), backend.parameter_dtype) for name, x in weights.items()}
    (_, out), grads = backend.value_and_grad(total, has_aux=True)({"x": placed(backend, grid(0, 2, 4)), **params})
    for x in (out, grads["x"]):
        assert ops.to_numpy(x)[1].tolist() == [0.0] * 4
        assert ops.to_numpy(x)[0].any()
    assert ops.to_numpy(grads["gates"])[1:].tolist() == [0.0] * 3
    for name in ("w_in", "w_out"):
        assert [bool(ops.to_numpy(grads[name])[expert].any()) for expert in (0, 1)] == [False, True]


@every_form_that_trains
def test_unrouted_assignments_give_and_take_nothing(target):
    """Gate 0: the row does not reach its token, and no gradient reaches the row."""
    backend = target.build()
    ops = backend.ops
    plan = dispatch_plan(ops, ops.from_numpy(np.array([1, 2, 2, 2])), 2, 2)
    weight_N = ops.cast(ops.from_numpy(np.array([0.5, 0.0, 0.0, 0.0])), backend.parameter_dtype)

    def total(params):
        out = ops.unpermute(params["y"], weight_N, plan)
        return ops.sum(out), out

    y = placed(backend, grid(0, 4, 3))
    (_, out), grads = backend.value_and_grad(total, has_aux=True)({"y": y})
    assert_close(ops.to_numpy(out), [grid(0, 4, 3)[0] / 2, np.zeros(3)], TOLERANCE[target.dtype])
    assert ops.to_numpy(grads["y"]).tolist() == [[0.5] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]
