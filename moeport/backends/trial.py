"""Fused operators are tried before they are used: candidates, examples, verdicts. All frameworks share this.

A candidate stands in for a kernel of `Ops` only if, on the device and in the compute type, it reproduces the values
and the gradients of the default composition. An operator that is missing, wrong, or without a gradient is left out, and
`kernel_choices` says why. Of several that pass, the first is used, unless `moeport.backends.timing` finds a faster one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moeport.backends.examples import EXAMPLES
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.errors import BackendUnavailableError
from moeport.facts import FusedKernel

AUTO, DEFAULT = "auto", "default"
"""Values of `backend.kernels` besides the names of operators."""

TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-5, "float64": 1e-12}
"""Largest difference from the composition, relative to its largest value."""

Evaluate = Callable[[Ops, Callable[..., Array], Sequence[Any], int], list[np.ndarray | None]]
"""Computes a function of arrays with a framework. Takes the operations, the function, its arguments, and how many of
the arrays among them, from the first, are differentiated. Returns the value, and the gradients of a weighted sum of it;
None for a gradient that does not exist.
"""


def serves_all(*_: Any, **__: Any) -> str | None:
    """The limit of an operator without one."""
    return None


@dataclass(frozen=True)
class Candidate:
    """A fused form of a kernel."""

    fact: FusedKernel
    function: Callable[..., Array]
    """The first argument is the Ops, the others are those of the kernel."""
    limit: Callable[..., str | None] = serves_all
    """Why it cannot serve some arguments of the kernel, by its documentation; None if it can."""
    bits: str | None = None
    """Candidates, and the composition, whose results have the same bits by construction (the same products on the same
    operands, the same sums in the same order) have the same word here; that of the composition is `composition`. None:
    its bits are its own. Where results must be reproducible, time chooses only among those of the same bits.
    """
    is_smooth: bool = False
    """Whether its gradient can be differentiated in turn; otherwise second derivatives are refused."""
    is_traceable: bool = True
    """Whether it may be part of a compiled graph; otherwise the composition is."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for a kernel."""

    candidate: Candidate | None
    """None: the composition."""
    label: str
    """The name of the fused form, or why none is used."""
    named: bool = False
    """Whether the user named it, so that it must serve whatever the model asks for."""

    @property
    def operator(self) -> str:
        """The name of the fused form, or `composition`."""
        return self.candidate.fact.name if self.candidate else "composition"

    @property
    def function(self) -> Callable[..., Array] | None:
        """The fused form."""
        return self.candidate.function if self.candidate else None


def wish_for(kernel: str, setting: str | Mapping[str, str]) -> str:
    """What `backend.kernels` says about one kernel."""
    return setting if isinstance(setting, str) else setting.get(kernel, AUTO)


def choose(
    kernel: str,
    candidates: Iterable[Candidate],
    setting: str | Mapping[str, str],
    fault: Callable[[Candidate], str | None],
) -> Choice:
    """The first candidate for a kernel that passes its trial.

    Args:
        kernel: of `Ops`.
        candidates: of the device, for any kernel.
        setting: `backend.kernels`.
        fault: tries a candidate; returns why it may not be used.

    Raises BackendUnavailableError if the user has named an operator that the device lacks or that fails.
    """
    wish = wish_for(kernel, setting)
    if wish == DEFAULT:
        return Choice(None, "as backend.kernels says")
    refused = []
    for candidate in candidates:
        if candidate.fact.kernel == kernel and wish in (AUTO, candidate.fact.name):
            reason = fault(candidate)
            if reason is None:
                return Choice(candidate, candidate.fact.name, named=wish != AUTO)
            refused.append(f"{candidate.fact.name} {reason}")
    if wish != AUTO:
        why = "; ".join(refused) or f"this device has no operator named {wish}"
        raise BackendUnavailableError(f"backend.kernels: {kernel}: {why}; set {kernel} to auto or default")
    return Choice(None, "; ".join(refused))


def passing(
    kernel: str, candidates: Iterable[Candidate], fault: Callable[[Candidate], str | None]
) -> dict[str, Candidate]:
    """All candidates for a kernel that pass their trial, by name. Arguments as of `choose`."""
    return {each.fact.name: each for each in candidates if each.fact.kernel == kernel and fault(each) is None}


def fault_of(candidate: Candidate, ops: Ops, dtype: str, evaluate: Evaluate) -> str | None:
    """Try a candidate on the examples of its kernel.

    Args:
        candidate: what to try.
        ops: operations with the composition.
        dtype: compute type.
        evaluate: the framework's.

    Returns: what is wrong with it, as the end of a sentence about it; None if it agrees with the composition.
    """
    kernel = candidate.fact.kernel
    if dtype not in candidate.fact.dtypes:
        return f"does not compute in {dtype}"
    beyond = []
    for example in EXAMPLES[kernel]:
        arguments, differentiated = example(ops, dtype)
        limit = candidate.limit(*arguments)
        if limit:
            beyond.append(limit)
            continue
        expected = evaluate(ops, getattr(ops, kernel), arguments, differentiated)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                received = evaluate(ops, partial(candidate.function, ops), arguments, differentiated)
        except Exception as error:
            return failure(error)
        if any("autograd" in str(warning.message) for warning in said):
            return "has no gradient on this device, as a warning says"
        wrong = disagreement(expected, received, TOLERANCE[dtype])
        if wrong:
            return wrong
    return f"serves no example: {beyond[0]}" if len(beyond) == len(EXAMPLES[kernel]) else None


def failure(error: Exception) -> str:
    """What is wrong with a candidate that raises an error, from the first line of it."""
    reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
    return f"fails on this device: {reason}"


def disagreement(
    expected: Sequence[np.ndarray | None], received: Sequence[np.ndarray | None], tolerance: float
) -> str | None:
    """How a value and its gradients differ from what they should be; None if they agree."""
    for index, (want, got) in enumerate(zip(expected, received, strict=True)):
        if got is None or want is None:
            return f"has no gradient of its argument {index} on this device"
        if got.shape != want.shape:
            return f"is wrong on this device: of the shape {got.shape} instead of {want.shape}"
        with np.errstate(invalid="ignore", divide="ignore"):
            worst = float(np.abs(got - want).max() / np.abs(want).max())
        if not worst <= tolerance:
            return f"is wrong on this device by {worst:.1e}"
    return None


def refuse_named(setting: str | Mapping[str, str], device: str) -> None:
    """Refuse operators that are named on a device without any: raises BackendUnavailableError."""
    for kernel, wish in setting.items() if not isinstance(setting, str) else ():
        if wish not in (AUTO, DEFAULT):
            raise BackendUnavailableError(
                f"backend.kernels: {kernel}: {device} has no operator named {wish}; set {kernel} to auto or default"
            )
