"""The interface of a backend: a framework on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from moeport.backends.profiler import Profiler
from moeport.comm.communicator import TIMEOUT_SECONDS, Communicator
from moeport.comm.job import Job
from moeport.comm.mesh import Mesh
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import parameter_dtype, subtree
from moeport.core.routing import RouterContext
from moeport.core.weights import Box, Shard
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS, BackendFacts
from moeport.launch.launcher import Launch
from moeport.model.batch import Batch
from moeport.model.cache import NewTokens
from moeport.model.decoding import CachedDecoder, Decoder, RecomputingDecoder, new_cache
from moeport.model.forward_pass import BlockOutput, Pass
from moeport.model.loss_terms import MEANS, LossTerms
from moeport.model.planned import Planned
from moeport.model.transformer import Transformer


class Backend(ABC):
    """One framework on one device with one compute type."""

    name: ClassVar[str]
    """Its name in `backend.name`."""
    ops: Ops
    device: str
    """Label of the device, such as `cpu` or `cuda (NVIDIA H200)`."""
    dtype: str
    """Compute type, one of FLOAT_DTYPES."""
    private_names: ClassVar[Mapping[str, str]] = {}
    """Names of its framework that it uses although they are not public, and what for."""
    planned: Planned | None = None
    """What will be trained, where that is known before the compute type is asked for, which may be chosen by it."""

    @abstractmethod
    def __init__(self, config: BackendConfig):
        """Resolve device and dtype; raises BackendUnavailableError, with what to do."""

    @property
    def facts(self) -> BackendFacts:
        """What it can do on any machine: its row in the table."""
        return BACKENDS[self.name]

    @property
    def trains(self) -> bool:
        """Whether it differentiates; the numpy reference does not."""
        return self.facts.trains

    def forms(self) -> dict[str, Ops]:
        """Its operations by the name of the form that they come in, for what checks each: here the only one."""
        return {"eager": self.ops}

    @property
    def parameter_dtype(self) -> str:
        """Type of parameters and optimiser state."""
        return parameter_dtype(self.dtype)

    @abstractmethod
    def value_and_grad(self, fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """Differentiate `fn(params, *args) -> loss` (or `(loss, aux)`) with respect to `params`, a dict of arrays.

        Returns: a function that returns `(loss, grads)` or `((loss, aux), grads)`; a parameter that the loss does not
        depend on gets a gradient of zeros.
        """

    @abstractmethod
    def evaluation_model(self, model: Transformer, params: Mapping[str, np.ndarray]) -> EvaluationModel:
        """Place a model and its parameters on the device, for evaluation and generation."""

    @abstractmethod
    def training_model(
        self, model: Transformer, params: Mapping[str, np.ndarray], options: TrainingOptions, mesh: Mesh | None = None
    ) -> TrainingModel:
        """Place a model and its parameters on the device, with an optimiser.

        Args:
            model: its shapes; on several ranks, after `moeport.model.spread.spread`.
            params: parameters by name: whole arrays, or `Weights`, of which each rank reads its part.
            options: see `TrainingOptions`.
            mesh: the ranks that train together, each of which calls this; None: only this process.
        """

    @abstractmethod
    def communicator(
        self, launch: Launch | None, timeout_s: float = TIMEOUT_SECONDS, job: Job | None = None
    ) -> Communicator:
        """The communicator of all ranks of a job, or of only this process if `launch` is None; call it once.

        Args:
            launch: this process.
            timeout_s: longest time that the ranks may take to come, and that a collective may take.
            job: the ranks, if they have met already (`moeport.backends.join_job`); it then outlives the communicator.

        Raises:
            BackendUnavailableError: the backend does not work with the launcher.
            MeetingError: ranks are missing, or an address or a port is wrong.
        """

    @abstractmethod
    def matmul_flops_per_second(self) -> float:
        """Measured FLOP/s of a large matrix product in the compute type: the peak that MFU refers to."""

    def profiler(self, model: TrainingModel) -> Profiler:
        """What measures steps of a model with the framework's own profiler; it does nothing until it is asked to.

        Raises BackendUnavailableError if the backend has none.
        """
        raise BackendUnavailableError(f"metrics.profile: backend {self.name} has no profiler; expected false")

    def compilations(self) -> tuple[int, float]:
        """Number of graphs compiled so far in this process, and the seconds it took; (0, 0) if they are not counted."""
        return 0, 0.0

    def threads(self) -> str | None:
        """How many threads compute on the CPU, and how they wait for each other; None: the framework decides."""
        return None

    def news(self) -> list[str]:
        """What the backend has changed by itself since the last call, a line each, such as how its threads wait.

        No such change may change results.
        """
        return []

    def communication(self) -> dict[str, str | None]:
        """Libraries by which its ranks can communicate, each with its version, or with None where it is missing."""
        return {}

    def accelerators(self) -> list[tuple[str, int | None]]:
        """Product name, and memory in bytes if known, of every accelerator of its kind; empty for a CPU."""
        return []

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the framework and its libraries, by name."""

    @abstractmethod
    def kernel_choices(self) -> dict[str, str]:
        """For each kernel of `Ops`, the implementation used on this device and why."""

    def fused_kernels(self) -> dict[str, str]:
        """For each kernel for which the device has fused operators, the one that is used, or `composition`."""
        return {}

    def timed_kernels(self) -> dict[str, str] | None:
        """What the trial by time has chosen on machines of this kind: by case, the form and its milliseconds and those
        of the others. None: nothing is chosen by time on this device.
        """
        return None


@dataclass(frozen=True)
class TrainingOptions:
    """How a backend trains a model."""

    optimizer: OptimizerConfig
    """Optimiser and clipping; the schedule belongs to the trainer."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass."""
    compile: bool | None = None
    """Compile the model; None: the backend's default."""
    shard: bool | None = None
    """Divide parameters, gradients and optimiser state among ranks; None: the backend's default."""
    cuda_graphs: bool | Literal["auto"] = False
    """Replay passes as CUDA graphs; auto: where that gives the same and is faster."""


def whole_shards(arrays: Mapping[str, np.ndarray]) -> Iterator[Shard]:
    """Whole arrays as shards."""
    return (Shard(name, x.shape, Box.whole(x.shape), x) for name, x in arrays.items())


class EvaluationModel(ABC):
    """A model on a device. Arrays cross this interface as numpy: float32, or float64 if that is the compute type."""

    ops: Ops
    dtype: str
    """Compute type."""
    model: Transformer

    def decoder(self, context: int) -> Decoder:
        """What continues texts with this model, which sees at most `context` tokens at once."""
        if not self.model.is_incremental:
            return RecomputingDecoder(context, self.logits)
        return CachedDecoder(context, lambda: new_cache(self.model, self.ops, self.dtype, context), self.read)

    @abstractmethod
    def evaluate(self, batch: Batch) -> LossTerms:
        """Loss terms without gradients, on the device."""

    @abstractmethod
    def logits(self, token_BS: np.ndarray) -> np.ndarray:
        """Next-token scores (B, S, V) of ids (B, S), or class scores (B, V) of patches (B, S, P)."""

    @abstractmethod
    def token_losses(self, batch: Batch) -> np.ndarray:
        """Negative log-likelihood of each target in nats, (B, S); of text."""

    @abstractmethod
    def read(self, new: NewTokens) -> np.ndarray:
        """Read tokens that follow those in a cache, to which they are added. Returns scores (B, V), as `next_scores`
        of `moeport.model.decoding`.
        """

    @abstractmethod
    def parameters(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Parameters by name: those in `names`, by default all."""

    @abstractmethod
    def load_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        """Replace some or all parameters by name; of `Weights` only the local part is read."""

    def shards(self) -> Iterator[Shard]:
        """The parts of the parameters that this rank is to write: over all ranks, every entry exactly once.

        Every rank calls it. The arrays may be views of live memory, which the next step changes. This default, of whole
        arrays, is for one rank.
        """
        return whole_shards(self.parameters())


class TrainingModel(EvaluationModel):
    """A model on a device with gradients and optimiser state.

    With several ranks, every rank calls every method in the same order; parameters, gradients and state are whole on
    each of them.
    """

    runs_ahead: bool = False
    """Whether it pays that the host does not wait for the results of a step before it begins the next.

    Then `step` must itself leave parameters and optimiser state as they are, in this and all later steps, once a loss
    of any rank or the norm was not finite.
    """

    @abstractmethod
    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        """Forward and backward of one micro-batch; adds `share` times its gradient to the gradients.

        Args:
            batch: this rank's.
            share: fraction of the step, over all ranks, that the micro-batch makes up.
            is_last: whether this is the last micro-batch of the step; only then are gradients added over ranks.

        Returns: the terms of this rank's batch, on the device, detached, not weighted by `share`.
        """

    @abstractmethod
    def gradient_norm(self) -> Array:
        """Global 2-norm of all gradients over all ranks, on the device."""

    @abstractmethod
    def step(self, learning_rate: float, norm: Array) -> None:
        """Clip by `norm`, apply the optimiser, clear the gradients."""

    @abstractmethod
    def gradients(self) -> dict[str, np.ndarray]:
        """Accumulated gradients of the trained parameters by name."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, np.ndarray]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` of every trained parameter; empty before the first step."""

    def optimizer_shards(self) -> Iterator[Shard]:
        """The parts of the optimiser's state that this rank is to write, as `shards` gives them."""
        return whole_shards(self.optimizer_state())

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Restore the state after `steps` optimiser steps."""

    @abstractmethod
    def first_non_finite(self, batch: Batch) -> str | None:
        """Name of the first tensor with a NaN or infinity: parameters, then activations and losses in the order of
        execution on `batch`, then gradients. None if there is none.
        """


def find_non_finite(
    ops: Ops,
    model: Transformer,
    params: Mapping[str, Array],
    batch: Batch,
    dtype: str,
    gradients: Mapping[str, np.ndarray],
) -> str | None:
    """The neutral part of `TrainingModel.first_non_finite`."""

    def finite(x: Array) -> bool:
        return bool(np.isfinite(ops.to_numpy(x)).all())

    for name, value in params.items():
        if not finite(value):
            return f"parameter {name}"

    found: list[str] = []

    def run_block(run: Pass, x_BSD: Array, context: RouterContext) -> BlockOutput:
        name = f"layers.{context.layer}"
        output = model.blocks[context.layer].forward(run, subtree(name, params), x_BSD, context)
        if not finite(output[0]):
            found.append(f"output of {name}")
        return output

    run = replace(model.forward_pass(ops, batch.token_BS.shape[1], dtype, training=True), run_block=run_block)
    terms = model.loss(run, params, batch)
    if found:
        return found[0]
    for name in (*MEANS, "loss"):
        if not finite(getattr(terms, name)):
            return name
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            return f"gradient of {name}"
    return None
