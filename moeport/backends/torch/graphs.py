"""Forward and backward pass of a micro-batch as one recorded graph, for small models, where launches take the time.

What a device must offer is a `Recorder`; `moeport.backends.torch.cuda.recorder` has CUDA's, which has not been run on
hardware. Everything else is here and runs on any device.

A pass is replayed only after a trial: some passes run as they are, one of them is watched for waits of the host, one is
recorded, and the replay must give the loss terms and the gradients of two passes, and be faster. A pass that fails any
of this, or raises an error while it is recorded, is never recorded again, and the run goes on as if nothing had been
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from moeport.backends.base import TrainingOptions
from moeport.backends.torch.private import add_each, is_profiled
from moeport.errors import BackendUnavailableError
from moeport.model.batch import Batch
from moeport.model.loss_terms import LossTerms

WARM_UP = 2
"""Passes before one is watched: in them, kernels are chosen and compiled."""
LAUNCHES = 0.5
"""Least share of a pass in which the host still launches: below it, the device is the slower one."""
GAIN = 0.95
"""Most of a pass's time that a replay may take."""
TOLERANCE = 2**-6
"""Largest difference of a replay, relative to the largest value, where bits may differ from run to run."""

Run = Callable[[Batch, float], LossTerms]
"""Forward and backward of a batch on the device and its share of the step. Adds to gradients; returns the terms."""


class Recorder(Protocol):
    """A device that records what is launched, and launches it again."""

    def warm(self, run: Callable[[], LossTerms]) -> LossTerms:
        """Run as it is, in the way that a recording asks for."""

    def record(self, run: Callable[[], LossTerms]) -> tuple[Callable[[], None], LossTerms]:
        """Record and do not run. Returns what replays it, and the arrays that each replay writes."""

    def watch(self) -> AbstractContextManager[list[str]]:
        """Where the host waits for the device within the block."""

    def seconds(self, run: Callable[[], object]) -> tuple[float, float]:
        """How long the host, and host and device together, take to run something."""


@dataclass
class _Form:
    """How passes of one kind are computed: the shapes of their batch, and their share of the step."""

    passes: int = 0
    waits: list[str] = field(default_factory=list)
    batch: Batch | None = None
    replay: Callable[[], None] | None = None
    terms: LossTerms | None = None
    gradients: list[Tensor | None] = field(default_factory=list)
    refused: str = ""


class GraphedPass:
    """Runs passes, and replays them where that gives the same and is faster.

    Args:
        run: a pass.
        parameters: their gradients are what a pass adds to.
        recorder: of the device.
        must: raise an error where a pass cannot be replayed.
        say: takes a line about what was chosen.
    """

    def __init__(
        self,
        run: Run,
        parameters: Iterable[nn.Parameter],
        recorder: Recorder,
        must: bool,
        say: Callable[[str], None],
    ):
        self.run, self.parameters, self.recorder, self.must, self.say = run, list(parameters), recorder, must, say
        self.forms: dict[tuple[object, ...], _Form] = {}

    def __call__(self, batch: Batch, share: float) -> LossTerms:
        """A pass, as `Run`."""
        form = self.forms.setdefault(_kind(batch, share), _Form())
        if form.refused or is_profiled():  # a replay has no parts that a profile could name
            return self.run(batch, share)
        form.passes += 1
        if form.passes <= WARM_UP:
            return self.recorder.warm(lambda: self.run(batch, share))
        if form.passes == WARM_UP + 1:
            return self._watched(form, batch, share)
        if form.passes <= WARM_UP + 3:
            return self._tried(form, batch, share)
        return self._replayed(form, batch)

    def _watched(self, form: _Form, batch: Batch, share: float) -> LossTerms:
        """A pass that shows whether a recording is possible and worth while."""
        found: list[LossTerms] = []
        with self.recorder.watch() as waits:
            run = self.recorder.seconds(lambda: found.append(self.recorder.warm(lambda: self.run(batch, share))))
        host, whole = run
        if waits:
            self._refuse(form, f"the host waits for the device in it ({waits[0]})")
        elif host < LAUNCHES * whole and not self.must:
            self._refuse(form, "the device is busy longer than the host launches")
        return found[0]

    def _tried(self, form: _Form, batch: Batch, share: float) -> LossTerms:
        """A pass as it is, and its replay beside it."""
        before = self._gradients()
        self._set_gradients(_copies(before))
        found: list[LossTerms] = []
        _, plain = self.recorder.seconds(lambda: found.append(self.run(batch, share)))
        expected = self._gradients()
        try:
            self._set_gradients(_copies(before))
            if form.replay is None:
                self._record(form, batch, share)
                self._set_gradients(_copies(before))
                self._replayed(form, batch)  # the first time is slower
            self._set_gradients(_copies(before))
            again: list[LossTerms] = []
            _, replayed = self.recorder.seconds(lambda: again.append(self._replayed(form, batch)))
            fault = _difference([*found[0].flat(), *expected], [*again[0].flat(), *self._gradients()])
            if fault is None and replayed > GAIN * plain and not self.must:
                fault = f"it takes {replayed / plain:.2f} of the time"
        except Exception as error:
            fault = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        self._set_gradients(expected)
        if fault:
            self._refuse(form, fault)
        elif form.passes == WARM_UP + 3:
            self.say(f"passes are replayed as a graph, in {replayed / plain:.2f} of the time")
        return found[0]

    def _record(self, form: _Form, batch: Batch, share: float) -> None:
        """Record a pass that writes its gradients to arrays of its own."""
        form.batch = batch.mapped(torch.clone)
        static = form.batch
        self._set_gradients([None] * len(self.parameters))
        form.replay, form.terms = self.recorder.record(lambda: self.run(static, share))
        form.gradients = self._gradients()

    def _replayed(self, form: _Form, batch: Batch) -> LossTerms:
        """A replay on a batch. The arrays that it returns are not written by the next."""
        assert form.batch is not None
        assert form.terms is not None
        assert form.replay is not None
        earlier = self._gradients()
        if any(gradient is own is not None for gradient, own in zip(earlier, form.gradients, strict=True)):
            earlier = _copies(earlier)
        for own, new in zip(form.batch.arrays, batch.arrays, strict=True):
            own.copy_(new)
        form.replay()
        self._set_gradients([old if own is None else own for own, old in zip(form.gradients, earlier, strict=True)])
        both = list(zip(form.gradients, earlier, strict=True))
        added = [(own, old) for own, old in both if own is not None and old is not None]
        if added:
            with torch.no_grad():
                add_each([own for own, _ in added], [old for _, old in added])
        return form.terms.map(torch.clone)

    def _refuse(self, form: _Form, reason: str) -> None:
        """Run passes of this kind as they are from now on, and let go of the recording."""
        if self.must:
            raise BackendUnavailableError(
                f"backend.cuda_graphs: true, but a pass cannot be replayed: {reason}; expected auto or false"
            )
        form.refused, form.replay, form.terms, form.batch, form.gradients = reason, None, None, None, []
        self.say(f"passes are not replayed as a graph: {reason}")

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.parameters]

    def _set_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def _kind(batch: Batch, share: float) -> tuple[object, ...]:
    return (share, *batch.noise, *((tuple(x.shape), x.dtype) for x in batch.arrays))


def _copies(gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else gradient.clone() for gradient in gradients]


def _difference(expected: Iterable[Tensor | None], received: Iterable[Tensor | None]) -> str | None:
    """How a replay differs from its pass; None if it does not."""
    same_bits = torch.are_deterministic_algorithms_enabled()
    for want, got in zip(expected, received, strict=True):
        if want is None or got is None:
            if want is not got:
                return "it has other gradients"
        elif not torch.equal(want, got):
            if same_bits or not want.is_floating_point():
                return "it does not give the same bits"
            worst = float((want - got).abs().max() / want.abs().max())
            if not worst <= TOLERANCE:
                return f"it is wrong by {worst:.1e}"
    return None


def why_not(options: TrainingOptions, device: torch.device, ranks: int) -> str | None:
    """Why no pass of a run is recorded, whatever it computes; None: it may be."""
    if device.type != "cuda":
        return f"the device is {device.type}; expected cuda"
    if ranks > 1:
        return f"{ranks} ranks train together; expected one"
    if options.compile:
        return "backend.compile is true; expected one of the two"
    if options.activation_checkpointing:
        return "training.activation_checkpointing is true; expected false"
    return None


def graphed(
    run: Run,
    parameters: Iterable[nn.Parameter],
    options: TrainingOptions,
    device: torch.device,
    ranks: int,
    say: Callable[[str], None],
) -> Run:
    """A pass that is replayed where it can be and `backend.cuda_graphs` allows it.

    Raises BackendUnavailableError if it must be and cannot.
    """
    reason = why_not(options, device, ranks)
    if reason and options.cuda_graphs is True:
        raise BackendUnavailableError(f"backend.cuda_graphs: true cannot be: {reason}")
    if reason or not options.cuda_graphs:
        return run
    from moeport.backends.torch.cuda.recorder import CudaRecorder

    return GraphedPass(run, parameters, CudaRecorder(), options.cuda_graphs is True, say)
