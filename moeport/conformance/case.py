"""One use of one operation, with a formula for its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.backends.base import Backend
from moeport.core.array import Array
from moeport.core.dispatch import plan_dispatch
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import Ops
from moeport.core.routing import Routing


@dataclass(frozen=True, eq=False)
class Case:
    """One use of one operation."""

    op: str
    """Name in PRIMITIVES or KERNELS."""
    label: str
    call: Callable[..., Any]
    """(ops, *inputs) -> array, or a tuple of arrays."""
    formula: Callable[..., Any]
    """The same from numpy inputs, without Ops: float64, indices or truth values."""
    inputs: tuple[np.ndarray, ...] = ()
    """float64 arrays become the compute type of the target; the others are indices or conditions."""
    weights: tuple[int, ...] = ()
    """Positions of inputs that are parameters, of the target's parameter type."""
    differentiable: bool = True
    """By all its float inputs."""
    accurate: bool = False
    """The result is in float32 at least."""
    float64: bool = False
    """It computes in float64 whatever the compute type; not for devices that lack it."""

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def variables(self) -> tuple[int, ...]:
        """Positions of the inputs that it is differentiated by."""
        if not self.differentiable:
            return ()
        return tuple(position for position, x in enumerate(self.inputs) if x.dtype == np.float64)

    def arguments(self, backend: Backend) -> list[Array]:
        """The inputs on a backend, in the types a model would give them."""
        types = [backend.parameter_dtype if i in self.weights else backend.dtype for i in range(len(self.inputs))]
        return [
            place(backend, x, dtype) if x.dtype == np.float64 else backend.ops.from_numpy(x)
            for x, dtype in zip(self.inputs, types, strict=True)
        ]

    def outputs(self, ops: Ops, *arguments: Any) -> tuple[Any, ...]:
        """Results as a tuple."""
        out = self.call(ops, *arguments)
        return tuple(out) if isinstance(out, tuple | list) else (out,)

    def expected(self) -> tuple[np.ndarray, ...]:
        """What `formula` gives, as a tuple of arrays."""
        out = self.formula(*self.inputs)
        return tuple(np.asarray(x) for x in (out if isinstance(out, tuple | list) else (out,)))


def place(backend: Backend, x: np.ndarray, dtype: str) -> Array:
    """Floats in a type of the backend; float64 reaches the device only if that is the type."""
    host = x.astype("float64" if dtype == "float64" else "float32")
    return backend.ops.cast(backend.ops.from_numpy(host), dtype)


def dispatch_plan(ops: Ops, expert_N: Array, choices: int, num_experts: int) -> DispatchPlan:
    """The plan for assignments in token-major order."""
    num_tokens = expert_N.shape[0] // choices
    return plan_dispatch(ops, Routing(expert_N, expert_N, num_tokens, num_experts, expert_N, expert_N, choices))


def chosen_tokens_plan(ops: Ops, expert_N: Array, token_N: Array, num_tokens: int, num_experts: int) -> DispatchPlan:
    """The plan where experts chose the tokens."""
    routing = Routing(expert_N, expert_N, num_tokens, num_experts, expert_N, expert_N, 1, token_N)
    return plan_dispatch(ops, routing)
