"""Operations that use the fused kernels of a device, as far as they pass their trial there.

A device has fused kernels if it has a table of them: a module whose `CANDIDATES` say how an operator serves a kernel of
`Ops`, and what it cannot serve. Everything else about fused kernels is here and in `moeport.backends.trial`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeport.backends.examples import EXAMPLES, differentiated_among
from moeport.backends.sized import SIZED, WORTH_FLOPS
from moeport.backends.timing import COMPOSITION, Case
from moeport.backends.torch.adamw_trial import ADAMW, step_fault
from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.private import inside_torch_func
from moeport.backends.torch.timed import fastest
from moeport.backends.torch.undisturbed import undisturbed
from moeport.backends.trial import AUTO, Candidate, Choice, choose, fault_of, passing, refuse_named, wish_for
from moeport.core.ops import Ops
from moeport.core.parameters import parameter_dtype
from moeport.errors import BackendUnavailableError, UserError

TABLES = {kind: f"moeport.backends.torch.{kind}.kernels" for kind in ("cpu", "cuda", "npu")}
"""Modules with `CANDIDATES`, by type of device."""
_made: dict[Any, FusedOps] = {}
"""By device, setting and determinism, since trials take time."""


def operations(device: torch.device, setting: str | Mapping[str, str] = AUTO) -> TorchOps:
    """The operations on a device.

    Args:
        device: where they run; without an index, on whichever device is current when they do.
        setting: `backend.kernels`.

    Raises BackendUnavailableError if the setting names an operator on a device without any.
    """
    if device.type not in TABLES:
        refuse_named(setting, device.type)
        return TorchOps(device)
    named = setting if isinstance(setting, str) else tuple(sorted(setting.items()))
    key = device, named, torch.are_deterministic_algorithms_enabled()  # with which some operators fail their trial
    if key not in _made and torch.compiler.is_compiling():  # a table cannot be read while a graph is traced
        return TorchOps(device)
    if key not in _made:
        made = FusedOps(device, import_module(TABLES[device.type]).CANDIDATES, setting)
        if not isinstance(setting, str):
            others = {kernel: wish for kernel, wish in setting.items() if kernel not in made.fused_kernels}
            refuse_named(others, device.type)
        _made[key] = made
    return _made[key]


def own_operations(device: torch.device, setting: str | Mapping[str, str] = AUTO) -> TorchOps:
    """The same operations, which share their trials but record for themselves where the composition served."""
    ops = operations(device, setting)
    if isinstance(ops, FusedOps):
        ops = copy.copy(ops)
        ops.given_way = {}
    return ops


class FusedOps(TorchOps):
    """Operations of which some kernels are fused.

    A kernel is tried in each compute type when it is first asked for in it. It gives way to the composition for
    arguments beyond its limits, for none at all, and under transforms such as torch.func.grad. Where several forms of a
    kernel pass, the first is used, or by `moeport.backends.timing` the fastest for the sizes of a call; while
    torch.use_deterministic_algorithms is on, the fastest of those that have the same bits as the first.

    Args:
        device: where they run.
        candidates: the table of the device.
        setting: `backend.kernels`.
    """

    def __init__(self, device: torch.device, candidates: Sequence[Candidate], setting: str | Mapping[str, str]):
        super().__init__(device)
        self.candidates, self.setting = candidates, setting
        self.fused_kernels = tuple(dict.fromkeys(candidate.fact.kernel for candidate in candidates))
        self.choices: dict[tuple[str, str], Choice] = {}
        self.rivals: dict[tuple[str, str], dict[str, Candidate]] = {}
        """All candidates that pass, by kernel and type; found only where time chooses."""
        self.times = True
        """Whether time chooses; not inside a trial by time."""
        self.timed: dict[Case, Choice] = {}
        """By what is chosen for."""
        self.given_way: dict[str, str] = {}
        """Why the composition served some arguments though an operator was chosen, by kernel."""

    @property
    def chooses_by_time(self) -> bool:
        """Whether there is a kernel whose form time chooses."""
        return any(wish_for(kernel, self.setting) == AUTO and kernel in SIZED for kernel in self.fused_kernels)

    def prepare(self, dtype: str) -> dict[str, Choice]:
        """What computes each kernel in a compute type, once every operator has been tried in it.

        Raises BackendUnavailableError if an operator that was named fails.
        """
        return {kernel: self.choice(kernel, _type_of(kernel, dtype)) for kernel in self.fused_kernels}

    def choice(self, kernel: str, dtype: str) -> Choice:
        """What computes a kernel in a type, unless time chooses another form for the sizes of a call."""
        key = kernel, dtype
        if key not in self.choices:
            self.choices[key] = undisturbed(
                self.device, lambda: choose(kernel, self.candidates, self.setting, self._fault(kernel, dtype))
            )
        return self.choices[key]

    def verdicts(self, dtype: str) -> dict[tuple[str, str], str | None]:
        """By kernel and name, what is wrong with each operator of the table in a compute type; None if it passes."""
        return {
            (each.fact.kernel, each.fact.name): self._fault(each.fact.kernel, _type_of(each.fact.kernel, dtype))(each)
            for each in self.candidates
        }

    def _fault(self, kernel: str, dtype: str) -> Callable[[Candidate], str | None]:
        """What tries a candidate in a type."""
        plain = TorchOps(self.device)

        def fault(candidate: Candidate) -> str | None:
            if kernel == ADAMW:
                return step_fault(candidate, self.device, dtype)
            return fault_of(candidate, plain, dtype, value_and_gradients)

        return fault

    def serving(self, kernel: str, x: Tensor, rest: Sequence[Any], options: Mapping[str, Any]) -> Candidate | None:
        """The candidate that serves a call; None: the composition does.

        Raises BackendUnavailableError if the user has named an operator, and it cannot serve the call.
        """
        dtype = self.dtype(x)
        is_traced = torch.compiler.is_compiling()
        is_too_late = is_traced and (kernel, dtype) not in self.choices  # nothing can be tried while a graph is traced
        if not x.numel() or is_too_late or (inside_torch_func() and not is_traced):
            return None
        choice = self.choice(kernel, dtype)
        if is_traced:
            if choice.candidate is not None and not choice.candidate.is_traceable:
                return None
        elif self.times and kernel in SIZED and wish_for(kernel, self.setting) == AUTO:
            timed = self.by_time(kernel, dtype, choice, (x, *rest), options)
            if timed.candidate is None:
                self.can_serve(kernel, choice, x, *rest, **options)  # notes why not, if the sizes are beyond it
                return None
            if timed.candidate.limit(x, *rest, **options) is None:  # other calls of the same sizes may be beyond it
                return timed.candidate
        return choice.candidate if self.can_serve(kernel, choice, x, *rest, **options) else None

    def by_time(
        self, kernel: str, dtype: str, incumbent: Choice, args: Sequence[Any], options: Mapping[str, Any]
    ) -> Choice:
        """The fastest form for the sizes of a call, which is tried when they come for the first time."""
        most_flops = SIZED[kernel].most_flops
        if most_flops is not None and most_flops(*args, **options) < WORTH_FLOPS:
            return incumbent
        sizes = SIZED[kernel].sizes_of(self, *args, **options)
        if sizes is None:
            return incumbent
        case = Case(kernel, dtype, sizes, same_bits=torch.are_deterministic_algorithms_enabled())
        if case not in self.timed:
            forms = [each for each in self.candidates if each.fact.kernel == kernel]
            bits = [COMPOSITION, *(each.bits or each.fact.name for each in forms)]
            if SIZED[kernel].flops(dict(sizes)) < WORTH_FLOPS or (case.same_bits and len(set(bits)) == len(bits)):
                self.timed[case] = incumbent
            else:
                self.timed[case] = undisturbed(self.device, lambda: self._by_trial(case, incumbent, args, options))
        return self.timed[case]

    def _by_trial(self, case: Case, incumbent: Choice, args: Sequence[Any], options: Mapping[str, Any]) -> Choice:
        key = case.kernel, case.dtype
        if key not in self.rivals:
            self.rivals[key] = passing(case.kernel, self.candidates, self._fault(*key))
        found = {name: each for name, each in self.rivals[key].items() if each.limit(*args, **options) is None}
        bits = {COMPOSITION: COMPOSITION} | {name: each.bits or name for name, each in found.items()}
        first = incumbent.operator if incumbent.operator in found else next(iter(found), COMPOSITION)
        allowed = [name for name in bits if not case.same_bits or bits[name] == bits[first]]
        if len(allowed) < 2:
            return incumbent
        forms = {name: found[name].function if name in found else _composition(case.kernel) for name in allowed}
        ops = copy.copy(self)
        ops.times = False
        try:
            timed = fastest(ops, case, forms, first, _composition(case.kernel))
        except torch.OutOfMemoryError:  # the device is full, and must not be the reason for which a run fails
            return incumbent
        return Choice(found.get(timed.chosen), f"{timed.chosen} ({timed})")

    def can_serve(self, kernel: str, choice: Choice, *args: Any, **options: Any) -> bool:
        """Whether what was chosen serves some arguments of its kernel.

        Raises BackendUnavailableError if it does not, and the user has named it.
        """
        reason = choice.candidate.limit(*args, **options) if choice.candidate else None
        if reason and choice.named:
            raise BackendUnavailableError(
                f"backend.kernels: {kernel}: {choice.label}: {reason}; set {kernel} to auto or default"
            )
        if reason:
            self.given_way[kernel] = reason
        return choice.candidate is not None and reason is None

    @override
    def fuses(self, kernel: str, dtype: str) -> bool:
        if kernel in self.fused_kernels and self.choice(kernel, dtype).candidate is not None:
            return True
        return getattr(TorchOps, kernel) is not getattr(Ops, kernel)

    def foresee(self, dtype: str, arguments: Mapping[str, Sequence[Any]]) -> None:
        """Find out what the composition will serve, from arguments by kernel of the shapes that a model will have."""
        for kernel, args in arguments.items():
            if kernel in self.fused_kernels:
                self.can_serve(kernel, self.choice(kernel, dtype), *args)

    def describe(self, composed: Mapping[str, str], dtype: str) -> dict[str, str]:
        """For each kernel, what computes it and why.

        Args:
            composed: what computes it without fused kernels, by kernel.
            dtype: compute type.
        """
        described = dict(composed)
        for kernel, choice in self.prepare(dtype).items():
            if choice.candidate is None:
                described[kernel] = f"{composed[kernel]}; {choice.label}"
            else:
                described[kernel] = choice.label
                if kernel in self.given_way:
                    described[kernel] += f"; where it cannot serve ({self.given_way[kernel]}): {composed[kernel]}"
            for case, timed in self.timed.items():
                if (case.kernel, case.dtype) == (kernel, dtype) and timed.operator != choice.operator:
                    described[kernel] += f"; by time for {case.label}: {timed.label}"
        return described


def _type_of(kernel: str, dtype: str) -> str:
    """The type in which a kernel computes, or the optimiser steps, in runs of a compute type."""
    return parameter_dtype(dtype) if kernel == ADAMW else dtype


def _composition(kernel: str) -> Callable[..., Any]:
    """The form that computes a kernel without a candidate, as a function of Ops and arguments."""
    form: Callable[..., Any] = getattr(TorchOps, kernel)
    return form


def _overridden(kernel: str) -> Callable[..., Any]:
    """The method of a kernel that may be fused."""

    @functools.wraps(_composition(kernel))
    def run(self: FusedOps, x: Tensor, *rest: Any, **options: Any) -> Any:
        candidate = self.serving(kernel, x, rest, options) if kernel in self.fused_kernels else None
        if candidate is None:
            return _composition(kernel)(self, x, *rest, **options)
        y = candidate.function(self, x, *rest, **options)
        return y if candidate.is_smooth else _differentiable_once(y, kernel, candidate.fact.name)

    return run


for _kernel in EXAMPLES:
    setattr(FusedOps, _kernel, _overridden(_kernel))


def _differentiable_once(y: Tensor, kernel: str, name: str) -> Tensor:
    """The result of a fused operator, whose gradient must not be differentiated: that derivative would be missing."""

    def refuse(_: Tensor) -> None:
        if torch.is_grad_enabled():  # so under create_graph=True
            raise UserError(
                f"{name} has no second derivative; expected a backward pass without create_graph=True, or "
                f"backend.kernels: {{{kernel}: default}} (kernels={{'{kernel}': 'default'}} of moeport.torch.MoE)"
            )

    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(refuse)
    return y


def value_and_gradients(
    ops: Any, function: Callable[..., Tensor], arguments: Sequence[Any], differentiated: int
) -> list[np.ndarray | None]:
    """Implements `moeport.backends.trial.Evaluate`."""
    given, leaves = list(arguments), []
    for index in differentiated_among(arguments, differentiated):
        given[index] = arguments[index].detach().requires_grad_()
        leaves.append(given[index])
    y = function(*given)
    wide = ops.accurate(y)
    weights = np.random.default_rng(1).standard_normal(tuple(y.shape)).astype(ops.dtype(wide))
    total = (wide * ops.from_numpy(weights)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return [None if x is None else ops.to_numpy(x) for x in (y, *found)]
