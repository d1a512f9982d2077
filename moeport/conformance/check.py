"""A backend against the formulas: what each operation gives, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import Backend
from moeport.config.training import BackendConfig
from moeport.conformance import kernels, primitives
from moeport.conformance.case import Case, place
from moeport.conformance.differences import Slopes, finite_difference, gradient_limit
from moeport.conformance.numbers import grid
from moeport.core.array import Array
from moeport.core.ops import FLOAT_DTYPES, Ops

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2**-7}
"""Forward, relative to the largest element."""
GRADIENT_TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2**-6}
"""Backward, likewise."""
CASES: tuple[Case, ...] = (*primitives.CASES, *kernels.CASES)
"""At least one of every operation."""


@dataclass(frozen=True)
class Finding:
    """How one result compares with what it must be."""

    nearness: float
    """The largest error over its limit; 0 for what must be equal and is."""
    problem: str | None = None
    """What is wrong; None: nothing."""


def check_values(case: Case, backend: Backend, ops: Ops | None = None) -> Finding:
    """The results of a case against its formula: shapes, types and values.

    Args:
        case: what to compute.
        backend: what computes it.
        ops: another form of the backend's operations; default: `backend.ops`.
    """
    ops = ops or backend.ops
    got, want = case.outputs(ops, *case.arguments(backend)), case.expected()
    if len(got) != len(want):
        return _wrong(f"{len(got)} results, expected {len(want)}")
    return _worst([_check_result(ops, x, expected, case, backend.dtype) for x, expected in zip(got, want, strict=True)])


def _check_result(ops: Ops, x: Array, expected: np.ndarray, case: Case, dtype: str) -> Finding:
    if tuple(x.shape) != expected.shape:
        return _wrong(f"shape {tuple(x.shape)}, expected {expected.shape}")
    if expected.dtype.kind == "f":
        least = "float32" if dtype == "bfloat16" and case.accurate else dtype
        if ops.dtype(x) != least:
            return _wrong(f"type {ops.dtype(x)}, expected {least}")
        return _compare(ops.to_numpy(x), expected, closeness(expected, TOLERANCE[dtype]))
    if ops.dtype(x) in FLOAT_DTYPES:
        return _wrong(f"type {ops.dtype(x)}, expected integers or truth values")
    return _compare(ops.to_numpy(x), expected, np.zeros(expected.shape))


def closeness(want: np.ndarray, tolerance: float) -> np.ndarray:
    """How far a result may be from `want`: by `tolerance` relative to the element plus the largest finite one."""
    size = np.where(np.isfinite(want), np.abs(want), 0.0)
    limit: np.ndarray = tolerance * (size + size.max(initial=0.0))
    return limit


def check_gradients(case: Case, backend: Backend, ops: Ops | None = None) -> Finding:
    """The gradients of a case that has variables against finite differences. Arguments as in `check_values`."""
    found = gradients(case, backend, ops or backend.ops)
    if found.keys() != set(case.variables):
        return _wrong(f"gradients by {sorted(found)}, expected {sorted(case.variables)}")
    findings = []
    for position, want in finite_differences(case).items():
        x = found[position]
        dtype = backend.parameter_dtype if position in case.weights else backend.dtype
        findings.append(_check_gradient(backend, x, want, dtype, f"by input {position}"))
    return _worst(findings)


def _check_gradient(backend: Backend, x: Array, want: Slopes, dtype: str, where: str) -> Finding:
    if tuple(x.shape) != want.value.shape:
        return _wrong(f"{where}: shape {tuple(x.shape)}, expected {want.value.shape}")
    if backend.ops.dtype(x) != dtype:
        return _wrong(f"{where}: type {backend.ops.dtype(x)}, expected {dtype}")
    got = backend.ops.to_numpy(x)
    return _compare(got, want.value, gradient_limit(got, want, GRADIENT_TOLERANCE[backend.dtype]), f"{where}: ")


def cotangents(case: Case) -> list[np.ndarray]:
    """By what the results of a case are weighted in the sum that is differentiated."""
    return [grid(seed, *out.shape) for seed, out in enumerate(case.expected(), start=100)]


@functools.cache
def finite_differences(case: Case) -> dict[int, Slopes]:
    """Gradient of the outputs' weighted sum by each variable, from the reference in float64."""
    weights, ops = cotangents(case), _reference()

    def total(position: int, x: np.ndarray) -> float:
        inputs = [x if i == position else value for i, value in enumerate(case.inputs)]
        return float(sum(np.sum(out * v) for out, v in zip(case.outputs(ops, *inputs), weights, strict=True)))

    return {
        position: finite_difference(functools.partial(total, position), case.inputs[position])
        for position in case.variables
    }


@functools.cache
def _reference() -> Ops:
    return get_backend(BackendConfig(name="numpy", device="cpu", dtype="float64")).ops


def gradients(case: Case, backend: Backend, ops: Ops) -> dict[int, Array]:
    """The same from the backend."""
    arguments, wide = case.arguments(backend), backend.parameter_dtype
    weights = [place(backend, v, wide) for v in cotangents(case)]

    def total(params: Mapping[str, Array]) -> Any:
        inputs = [params.get(str(i), x) for i, x in enumerate(arguments)]
        terms = [ops.sum(ops.cast(out, wide) * v) for out, v in zip(case.outputs(ops, *inputs), weights, strict=True)]
        return functools.reduce(lambda x, y: x + y, terms)

    _, found = backend.value_and_grad(total)({str(i): arguments[i] for i in case.variables})
    return {int(name): gradient for name, gradient in found.items()}


def _compare(got: np.ndarray, want: np.ndarray, limit: np.ndarray, where: str = "") -> Finding:
    """Entry by entry; infinities and what is not a number must be where they are expected."""
    same = (got == want) | ((got != got) & (want != want))
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(same, 0.0, np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)))
        error = np.where(np.isnan(error), np.inf, error)
        nearness = np.where(error == 0, 0.0, error / limit)
    if not nearness.size or nearness.max() <= 1:
        return Finding(float(nearness.max(initial=0.0)))
    first = tuple(int(i) for i in np.unravel_index(int(np.argmax(nearness)), nearness.shape))
    wrong, zeros = int((nearness > 1).sum()), not np.any(got) and np.any(want)
    return _wrong(
        f"{where}{wrong} of {nearness.size} values are wrong, the worst at {first}: expected {float(want[first]):g}, "
        f"received {float(got[first]):g}{'; all are zeros' if zeros else ''}",
        float(nearness.max()),
    )


def _wrong(problem: str, nearness: float = float("inf")) -> Finding:
    return Finding(nearness, problem)


def _worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda found: (found.problem is not None, found.nearness))
