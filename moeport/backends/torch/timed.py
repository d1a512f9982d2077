"""The trial by time with PyTorch: what `moeport.backends.timing` needs of a device, and the trial of one case."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeport.backends.examples import differentiated_among
from moeport.backends.sized import SIZED, WORTH_FLOPS
from moeport.backends.timing import (
    COMPOSITION,
    MARGIN,
    MARGIN_ON_CPU,
    ROUNDS,
    SECONDS,
    SECONDS_ON_CPU,
    Case,
    Machine,
    Timed,
    keep,
    kept,
    race,
)
from moeport.backends.torch.device import describe_device, synchronize
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import TOLERANCE, failure
from moeport.launch.machine import processor

Form = Callable[..., Tensor]
"""A form of a kernel, whose first argument is the Ops."""
Contenders = Mapping[str, Form]
"""By name."""


def machine_of(device: torch.device) -> Machine:
    """The kind of machine that a choice by time holds for."""
    is_cpu = device.type == "cpu"
    return Machine(
        processor().model if is_cpu else describe_device(device),
        torch.get_num_threads() if is_cpu else None,
        f"torch {torch.__version__}",
    )


def seconds_of(device: torch.device, run: Callable[[], Any]) -> float:
    """How long a device takes to run something once, without what was queued before."""
    synchronize(device)
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def fastest(ops: TorchOps, case: Case, contenders: Contenders, incumbent: str, reference: Form) -> Timed:
    """The choice for a case, of the cache or of a trial.

    Args:
        ops: operations on the device.
        case: what is chosen for.
        contenders: the forms that may be used, by name, among them the incumbent.
        incumbent: the form that is used unless another is faster.
        reference: the composition, which may be a contender too.

    Raises torch.OutOfMemoryError if the device has no room for a trial.
    """
    machine, names = machine_of(ops.device), frozenset(contenders)
    found = kept(machine, case, names)
    if found is None:
        found = keep(machine, case, names, _tried(ops, case, contenders, incumbent, reference))
    return found


def _tried(ops: TorchOps, case: Case, contenders: Contenders, incumbent: str, reference: Form) -> Timed:
    """Compare and time the contenders on inputs as large as the time allows."""
    part = _smallest_part(case)
    inputs = _Inputs(ops, case, part)
    expected = inputs.results(reference)
    failed: dict[str, str] = {}
    able = _without_faults(contenders, lambda form: inputs.fault(form, expected, TOLERANCE[case.dtype]), failed)
    if incumbent not in able:  # it passed on small inputs only
        incumbent, able = COMPOSITION, {COMPOSITION: reference} | able
    if case.same_bits:
        bits = inputs.results(able[incumbent])
        first = able.pop(incumbent)
        able = {incumbent: first} | _without_faults(able, lambda form: inputs.fault(form, bits, 0.0), failed)
    rounds, on_cpu = (ROUNDS[0] + 1) * len(able), ops.device.type == "cpu"
    seconds = SECONDS_ON_CPU if on_cpu else SECONDS
    while part > 1 and 2 * inputs.seconds(able[incumbent]) * rounds < seconds:
        part //= 2
        inputs = _Inputs(ops, case, part)
        inputs.seconds(able[incumbent])  # warms up
        first = able.pop(incumbent)
        able = {incumbent: first} | _without_faults(able, inputs.failure, failed)
    contenders = {name: partial(inputs.seconds, form) for name, form in able.items()}
    return replace(race(incumbent, contenders, seconds, MARGIN_ON_CPU if on_cpu else MARGIN), failed=failed)


def _without_faults(forms: Contenders, fault: Callable[[Form], str | None], failed: dict[str, str]) -> dict[str, Form]:
    """The forms without a fault; what is wrong with the others goes to `failed`."""
    faults = {name: fault(form) for name, form in forms.items()}
    failed.update({name: why for name, why in faults.items() if why})
    return {name: form for name, form in forms.items() if not faults[name]}


def _smallest_part(case: Case) -> int:
    """The power of two by which the work is divided at first, so that any device has done it in a moment."""
    part, flops = 1, SIZED[case.kernel].flops(dict(case.sizes))
    while flops / part > WORTH_FLOPS:
        part *= 2
    return part


class _Inputs:
    """Arguments of a kernel, and what runs forms of it on them, forward and backward."""

    def __init__(self, ops: TorchOps, case: Case, part: int):
        arguments, differentiated = SIZED[case.kernel].example(ops, case.dtype, dict(case.sizes), part)
        self.ops, self.case, self.part, self.arguments = ops, case, part, list(arguments)
        self.turn = 0
        self.leaves: list[Tensor] = []
        for place in differentiated_among(arguments, differentiated):
            self.arguments[place] = arguments[place].detach().requires_grad_()
            self.leaves.append(self.arguments[place])
        self.gradient: Tensor | None = None

    def results(self, form: Form) -> Sequence[Tensor]:
        """Value and gradients."""
        y = form(self.ops, *self.arguments)
        if self.gradient is None:
            self.gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.gradient, materialize_grads=True)]

    def seconds(self, form: Form) -> float:
        """How long one run takes; on a CPU, whose products may prepare code for each new shape, with a new load."""
        if self.gradient is None:
            self.results(form)
        if self.ops.device.type == "cpu":
            self.turn += 1
            load = SIZED[self.case.kernel].load(self.ops, dict(self.case.sizes), self.part, self.turn)
            for place, argument in load.items():
                self.arguments[place] = argument
        return seconds_of(self.ops.device, lambda: self.results(form))

    def fault(self, form: Form, expected: Sequence[Tensor], tolerance: float) -> str | None:
        """What is wrong with the value and gradients that a form gives at these sizes; None if they agree.

        Args:
            form: what is compared.
            expected: value and gradients.
            tolerance: relative to the largest value of each; 0: every bit must be the same.

        Raises torch.OutOfMemoryError, which says nothing about the form.
        """
        received, reason = self._received(form)
        if reason or all(_is_close(got, want, tolerance) for got, want in zip(received, expected, strict=True)):
            return reason
        return "is wrong at these sizes" if tolerance else "has other bits"

    def failure(self, form: Form) -> str | None:
        """Why a form does not run at these sizes; None if it does. Raises torch.OutOfMemoryError as `fault` does."""
        return self._received(form)[1]

    def _received(self, form: Form) -> tuple[Sequence[Tensor], str | None]:
        """Value and gradients, or why there are none."""
        try:
            return self.results(form), None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return (), failure(error)


def _is_close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    if not tolerance:
        return torch.equal(got, want)
    worst, largest = (got.double() - want.double()).abs().max(), want.double().abs().max()
    return bool(worst <= 2 * tolerance * largest)  # sums are longer here than in the trial by values
