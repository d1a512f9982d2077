"""Cases of every primitive."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moeport.conformance import formulas
from moeport.conformance.case import Case
from moeport.conformance.numbers import grid, rng

X, Y = grid(1, 3, 4), grid(2, 3, 4)
DISTINCT = rng(3).permutation(24).reshape(3, 8) / 8 - 1.5
POSITIVE = (4 + np.arange(12.0).reshape(3, 4)) / 8
TIES = np.array([0.5, -1.0, 0.5, 0.0, -0.0, 2.0, -1.0, 0.5, 2.0])
INFINITIES = np.array([1.0, np.inf, -np.inf, 0.0, np.inf, -np.inf])
WIDE_TIES = np.where(np.arange(300) % 97 == 5, 1.0, 0.0)
IDS = np.array([2, 0, 2, 4, 0])
PAIRS = np.array([[0, 2], [1, 1]])
NO_IDS = np.zeros(0, np.int64)
EVEN = np.arange(12).reshape(3, 4) % 2 == 0

CREATION = [
    Case(
        "from_numpy",
        "int32",
        lambda ops: ops.from_numpy(np.arange(6, dtype=np.int32)),
        lambda: np.arange(6),
    ),
    Case("from_numpy", "bool", lambda ops: ops.from_numpy(EVEN), lambda: EVEN),
    Case(
        "to_numpy",
        "round trip",
        lambda ops, x: ops.from_numpy(ops.to_numpy(x)),
        lambda x: x,
        (X,),
        accurate=True,
        differentiable=False,
    ),
    Case("constant", "times array", lambda ops, x: x * ops.constant(0.5, ops.dtype(x)), lambda x: x * 0.5, (X,)),
    Case("zeros", "shape", lambda ops, x: x + ops.zeros((3, 4), ops.dtype(x)), lambda x: x, (X,)),
    Case("zeros", "scalar", lambda ops, x: ops.zeros((), ops.dtype(x)), lambda x: 0.0, (X,), differentiable=False),
    Case(
        "zeros", "no rows", lambda ops, x: ops.zeros((0, 4), ops.dtype(x)), lambda x: x[:0], (X,), differentiable=False
    ),
    Case(
        "index",
        "in where",
        lambda ops, c: ops.where(c, ops.arange(4), ops.index(7)),
        lambda c: np.where(c, np.arange(4), 7),
        (EVEN,),
    ),
    Case("index", "compared", lambda ops: ops.arange(4) < ops.index(2), lambda: np.arange(4) < 2),
    Case("arange", "n", lambda ops: ops.arange(5), lambda: np.array([0, 1, 2, 3, 4])),
    Case("arange", "0", lambda ops: ops.arange(0), lambda: NO_IDS),
    Case(
        "dtype",
        "names",
        lambda ops, x: ops.from_numpy(
            np.array([ops.dtype(ops.cast(x, name)) == name for name in ("float32", "float64")])
        ),
        lambda x: np.array([True, True]),
        (X,),
        differentiable=False,
        float64=True,
    ),
    Case(
        "cast",
        "and back",
        lambda ops, x: ops.cast(ops.cast(x, "float64"), ops.dtype(x)),
        lambda x: x,
        (X,),
        float64=True,
    ),
    Case(
        "cast",
        "to float32",
        lambda ops, x: ops.cast(ops.cast(x, "float32"), ops.dtype(x)),
        lambda x: x,
        (X,),
    ),
]

SHAPES = [
    Case("reshape", "merge", lambda ops, x: ops.reshape(x, (2, 6)), lambda x: np.array(x.ravel()).reshape(2, 6), (X,)),
    Case("reshape", "unknown", lambda ops, x: ops.reshape(x, (-1,)), lambda x: np.array([*x[0], *x[1], *x[2]]), (X,)),
    Case(
        "transpose",
        "3",
        lambda ops, x: ops.transpose(x, (2, 0, 1)),
        lambda x: np.array([[[x[i, j, k] for j in range(3)] for i in range(2)] for k in range(4)]),
        (grid(4, 2, 3, 4),),
    ),
    Case("concat", "rows", lambda ops, x, y: ops.concat((x, y), axis=0), lambda x, y: np.array([*x, *y]), (X, Y)),
    Case(
        "concat", "last", lambda ops, x, y: ops.concat((x, y), axis=-1), lambda x, y: np.array([*x.T, *y.T]).T, (X, Y)
    ),
    Case(
        "concat",
        "with empty",
        lambda ops, x: ops.concat((ops.zeros((0, 4), ops.dtype(x)), x), axis=0),
        lambda x: x,
        (X,),
    ),
    Case(
        "split",
        "sizes",
        lambda ops, x: tuple(ops.split(x, (1, 3), axis=1)),
        lambda x: (x[:, :1], x[:, 1:]),
        (X,),
    ),
    Case(
        "split",
        "size 0",
        lambda ops, x: tuple(ops.split(x, (0, 2, 0, 1, 0), axis=0)),
        lambda x: (x[:0], x[:2], x[:0], x[2:], x[:0]),
        (X,),
    ),
]

ELEMENTWISE = [
    Case("exp", "x", lambda ops, x: ops.exp(x), formulas.elementwise(np.exp), (X,)),
    Case("log", "x", lambda ops, x: ops.log(x), formulas.elementwise(np.log), (POSITIVE,)),
    Case("rsqrt", "x", lambda ops, x: ops.rsqrt(x), lambda x: x**-0.5, (POSITIVE,)),
    Case("sigmoid", "x", lambda ops, x: ops.sigmoid(x), lambda x: 1 / (1 + np.exp(-x)), (X,)),
    Case(
        "sigmoid",
        "large",
        lambda ops, x: ops.sigmoid(x),
        lambda x: np.array([0.0, 0.5, 1.0]),
        (np.array([-1024.0, 0.0, 1024.0]),),
    ),
    Case("erf", "x", lambda ops, x: ops.erf(x), formulas.elementwise(formulas.erf_series), (X,)),
    Case("where", "arrays", lambda ops, c, x, y: ops.where(c, x, y), lambda c, x, y: c * x + ~c * y, (EVEN, X, Y)),
    Case(
        "where",
        "broadcast",
        lambda ops, c, x, y: ops.where(c, x, y),
        lambda c, x, y: np.array([x[0], y[0], x[0]]),
        (np.array([[True], [False], [True]]), X[:1], Y[:1]),
    ),
    Case(
        "where",
        "constant",
        lambda ops, c, x: ops.where(c, ops.constant_like(-np.inf, x), x),
        lambda c, x: np.where(c, -np.inf, x),
        (EVEN, X),
        differentiable=False,
    ),
    Case("stop_gradient", "value", lambda ops, x: ops.stop_gradient(x), lambda x: x, (X,), differentiable=False),
]
REDUCTIONS = [
    Case("sum", "all", lambda ops, x: ops.sum(x), lambda x: sum(x.ravel().tolist()), (X,)),
    Case("sum", "axis", lambda ops, x: ops.sum(x, axis=0), lambda x: x[0] + x[1] + x[2], (X,)),
    Case("sum", "keepdims", lambda ops, x: ops.sum(x, axis=-1, keepdims=True), lambda x: x @ np.ones((4, 1)), (X,)),
    Case("sum", "indices", lambda ops, i: ops.sum(i), lambda i: np.int64(8), (IDS,)),
    Case("mean", "all", lambda ops, x: ops.mean(x), lambda x: sum(x.ravel().tolist()) / 12, (X,)),
    Case("mean", "axis", lambda ops, x: ops.mean(x, axis=1), lambda x: x @ np.ones(4) / 4, (X,)),
    Case(
        "mean", "keepdims", lambda ops, x: ops.mean(x, axis=0, keepdims=True), lambda x: np.ones((1, 3)) @ x / 3, (X,)
    ),
    Case("max", "axis", lambda ops, x: ops.max(x, axis=0), lambda x: np.array([max(c) for c in x.T]), (DISTINCT,)),
    Case(
        "max",
        "keepdims",
        lambda ops, x: ops.max(x, axis=-1, keepdims=True),
        lambda x: np.array([[max(row)] for row in x]),
        (DISTINCT,),
    ),
    Case("cumsum", "vector", lambda ops, i: ops.cumsum(i, axis=0), lambda i: np.array([2, 2, 4, 8, 8]), (IDS,)),
    Case("cumsum", "first", lambda ops, i: ops.cumsum(i, axis=0), lambda i: np.array([[0, 2], [1, 3]]), (PAIRS,)),
    Case("cumsum", "last", lambda ops, i: ops.cumsum(i, axis=-1), lambda i: np.array([[0, 2], [1, 2]]), (PAIRS,)),
    Case("softmax", "x", lambda ops, x: ops.softmax(x), formulas.along_last(formulas.softmax), (X,)),
    Case(
        "softmax",
        "masked",
        lambda ops, x: ops.softmax(x),
        formulas.along_last(formulas.softmax),
        (np.array([[0.5, -np.inf, 1.0], [-np.inf, -np.inf, 3.0]]),),
        differentiable=False,
    ),
    Case(
        "softmax",
        "huge",
        lambda ops, x: ops.softmax(x),
        formulas.along_last(formulas.softmax),
        (np.array([[10240.0, 10240.0, -10240.0]]),),
        differentiable=False,
    ),
    Case("logsumexp", "x", lambda ops, x: ops.logsumexp(x), formulas.along_last(formulas.log_sum_exp), (X,)),
    Case(
        "logsumexp",
        "huge",
        lambda ops, x: ops.logsumexp(x),
        lambda x: np.array([10240.0, -10240.0]),
        (np.array([[10240.0, 0.0], [-12288.0, -10240.0]]),),
        differentiable=False,
    ),
]
PRODUCTS = [
    Case("matmul", "matrices", lambda ops, x, y: ops.matmul(x, y), formulas.matmul, (X, grid(5, 4, 2))),
    Case(
        "matmul",
        "broadcast",
        lambda ops, x, y: ops.matmul(x, y),
        formulas.matmul,
        (grid(6, 2, 1, 3, 4), grid(7, 2, 4, 2)),
    ),
]
INDICES = [
    Case(
        "take_rows",
        "matrix",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: np.array([x[j] for j in i]),
        (grid(8, 5, 3), IDS),
    ),
    Case(
        "take_rows",
        "ids of two dimensions",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: np.array([[x[j] for j in row] for row in i]),
        (grid(8, 5, 3), np.array([[0, 4, 4], [1, 0, 4]])),
    ),
    Case(
        "take_rows",
        "vector",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: np.array([x[j] for j in i]),
        (grid(9, 5), IDS),
    ),
    Case(
        "take_rows",
        "rows of two dimensions",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: np.array([x[j] for j in i]),
        (grid(10, 5, 2, 2), IDS),
    ),
    Case(
        "take_rows",
        "indices",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: np.array([x[j] for j in i]),
        (np.arange(5) * 10, IDS),
    ),
    Case("take_rows", "no ids", lambda ops, x, i: ops.take_rows(x, i), lambda x, i: x[:0], (grid(8, 5, 3), NO_IDS)),
    Case(
        "take_last",
        "repeated",
        lambda ops, x, i: ops.take_last(x, i),
        lambda x, i: np.array([[row[j] for j in js] for row, js in zip(x, i, strict=True)]),
        (X, np.array([[0, 3], [1, 1], [2, 0]])),
    ),
    Case(
        "take_last",
        "three dimensions",
        lambda ops, x, i: ops.take_last(x, i),
        lambda x, i: np.array([[[x[a, b, i[a, b, 0]]] for b in range(2)] for a in range(2)]),
        (grid(11, 2, 2, 3), np.array([[[0], [2]], [[1], [1]]])),
    ),
    Case(
        "segment_sum",
        "with an empty segment",
        lambda ops, v, i: ops.segment_sum(v, i, 5),
        lambda v, i: formulas.segment_sum(v, i, 5),
        (grid(12, 5, 3), IDS),
    ),
    Case(
        "segment_sum",
        "vector",
        lambda ops, v, i: ops.segment_sum(v, i, 6),
        lambda v, i: formulas.segment_sum(v, i, 6),
        (grid(13, 5), IDS),
    ),
    Case(
        "segment_sum",
        "no rows",
        lambda ops, v, i: ops.segment_sum(v, i, 2),
        lambda v, i: np.zeros((2, 3)),
        (np.zeros((0, 3)), NO_IDS),
    ),
    Case(
        "one_hot",
        "vector",
        lambda ops, i, x: ops.one_hot(i, 5, ops.dtype(x)),
        lambda i, x: np.array([[float(j == k) for k in range(5)] for j in i]),
        (IDS, X),
        differentiable=False,
    ),
    Case(
        "one_hot",
        "two dimensions",
        lambda ops, i, x: ops.one_hot(i, 3, ops.dtype(x)),
        lambda i, x: np.array([[[float(j == k) for k in range(3)] for j in row] for row in i]),
        (PAIRS, X),
        differentiable=False,
    ),
    Case("bincount", "with absent", lambda ops, i: ops.bincount(i, 6), lambda i: np.array([2, 0, 2, 0, 1, 0]), (IDS,)),
    Case("bincount", "empty", lambda ops, i: ops.bincount(i, 3), lambda i: np.array([0, 0, 0]), (NO_IDS,)),
]


def _sorting() -> Iterator[Case]:
    """argsort and topk_ids under the pinned rule: of equal values the lower index first."""
    vectors = {"ties": TIES, "infinities": INFINITIES, "wide ties": WIDE_TIES, "indices": IDS, "one": TIES[:1]}
    for label, x in vectors.items():
        yield Case("argsort", label, lambda ops, x: ops.argsort(x), formulas.order, (x,), differentiable=False)
        yield Case(
            "argsort",
            f"{label} descending",
            lambda ops, x: ops.argsort(x, descending=True),
            lambda x: formulas.order(x, descending=True),
            (x,),
            differentiable=False,
        )
    rows = {
        "ties": np.stack([TIES, -TIES, TIES[::-1]]),
        "signed zeros": np.array([[-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]]),
        "infinities": np.stack([INFINITIES, -INFINITIES]),
        "wide ties": np.stack([WIDE_TIES, np.zeros(300)]),
        "three dimensions": DISTINCT.reshape(2, 3, 4),
    }
    for label, x in rows.items():
        for k in sorted({1, 2, min(x.shape[-1], 9)}):
            yield Case(
                "topk_ids",
                f"{k} of {label}",
                lambda ops, x, k=k: ops.topk_ids(x, k),
                lambda x, k=k: np.apply_along_axis(lambda row: formulas.order(row, descending=True)[:k], -1, x),
                (x,),
                differentiable=False,
            )


CASES = [*CREATION, *SHAPES, *ELEMENTWISE, *REDUCTIONS, *PRODUCTS, *INDICES, *_sorting()]
