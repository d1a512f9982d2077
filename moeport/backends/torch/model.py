"""Models on a PyTorch device: evaluation, gradients, optimiser steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from moeport.backends.base import EvaluationModel, TrainingModel, TrainingOptions, find_non_finite
from moeport.backends.torch.adafactor import Adafactor
from moeport.backends.torch.compiling import compile_blocks
from moeport.backends.torch.compute_copies import ComputeCopies
from moeport.backends.torch.graphs import graphed
from moeport.backends.torch.module import TransformerModule
from moeport.backends.torch.muon import Muon
from moeport.backends.torch.ops import DTYPES, TorchOps
from moeport.backends.torch.optimizer import AdamW
from moeport.backends.torch.placing import held
from moeport.backends.torch.sharding import distribute, local, sum_over_ranks, to_whole
from moeport.comm.mesh import Mesh, single_mesh
from moeport.core.array import Array
from moeport.core.parameters import parameter_dtype
from moeport.core.weights import Shard
from moeport.model.batch import Batch
from moeport.model.cache import NewTokens
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer

OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor}
"""By name, those that compute in the type of the parameters."""


class TorchEvaluationModel(EvaluationModel):
    """A model on one device, as a module."""

    ops: TorchOps

    def __init__(
        self,
        ops: TorchOps,
        dtype: str,
        model: Transformer,
        params: Mapping[str, np.ndarray],
        options: TrainingOptions | None = None,
        mesh: Mesh | None = None,
    ):
        self.ops, self.dtype, self.model = ops, dtype, model
        self.mesh = mesh or single_mesh(ops)
        self.is_distributed = self.mesh.world.size > 1
        self.specs = {spec.name: spec for spec in model.parameter_specs()}
        self.module, self.whole_on_all = self._without_values(options)
        state = self.module.state_dict()
        self.held = {name: held(state[name], spec, self.mesh) for name, spec in self.specs.items()}
        """What this rank holds of each parameter."""
        self._fill(self.specs, params)
        self.copies = ComputeCopies(self.module, self.specs, DTYPES[dtype], trains=options is not None)

    def _without_values(self, options: TrainingOptions | None) -> tuple[TransformerModule, list[nn.Parameter]]:
        """The module, on several ranks only this rank's part of it, and the parameters that all of them hold whole."""
        ops, distributes = self.ops, options is not None and self.is_distributed
        module = TransformerModule(
            self.model,
            ops,
            lambda spec: self.mesh.box(spec).shape,
            "meta" if distributes else ops.device,
            DTYPES[parameter_dtype(self.dtype)],
            self.dtype,
            options is not None and options.activation_checkpointing,
        ).eval()
        if not distributes:
            return module, []
        shard = options is None or options.shard is not False
        whole_on_all = distribute(module, self.mesh, shard, ops.device, DTYPES[self.dtype], self.specs)
        module.to_empty(device=ops.device)
        parameters = dict(module.named_parameters())
        return module, [parameters[name] for name in whole_on_all]

    def on_device(self, batch: Batch) -> Batch:
        """The same batch as device arrays; CUDA copies them without being waited for."""
        move = self.ops.from_numpy if self.ops.device.type != "cuda" else self._pinned
        return batch.mapped(move)

    def _pinned(self, array: np.ndarray) -> Tensor:
        """A copy on CUDA, by way of pinned memory. Not run on hardware."""
        kind = np.int64 if array.dtype.kind in "iu" else array.dtype
        host = torch.tensor(array.astype(kind, copy=False), pin_memory=True)
        return host.to(self.ops.device, non_blocking=True)

    @override
    def evaluate(self, batch: Batch) -> LossTerms:
        self.module.eval()
        with torch.no_grad():
            return self.module(self.on_device(batch))

    @override
    def logits(self, token_BS: np.ndarray) -> np.ndarray:
        self.module.eval()
        with torch.no_grad():
            return self.ops.to_numpy(self.module.logits(self.ops.from_numpy(token_BS)))

    @override
    def token_losses(self, batch: Batch) -> np.ndarray:
        self.module.eval()
        with torch.no_grad():
            return self.ops.to_numpy(self.module.token_losses(self.on_device(batch)))

    @override
    def read(self, new: NewTokens) -> np.ndarray:
        """Never compiled, since the cache is written in place."""
        if self.module.training:
            self.module.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return self.ops.to_numpy(self.module.read(new))

    @override
    def parameters(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        state = self.module.state_dict()
        return {name: self._whole(name, state[name]) for name in (state if names is None else names)}

    @override
    def load_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        self._fill(params, params)
        self.copies.refresh(params)

    @override
    def shards(self) -> Iterator[Shard]:
        parts = (self.held[name].shard(name, local(x)) for name, x in self.module.state_dict().items())
        return (part for part in parts if part.box.size)

    @torch.no_grad()
    def _fill(self, names: Iterable[str], params: Mapping[str, np.ndarray]) -> None:
        state = self.module.state_dict()
        for name in names:
            self.held[name].fill(local(state[name]), params, name)

    def _whole(self, name: str, x: Tensor) -> np.ndarray:
        return self.mesh.whole(self.specs[name], to_whole(x))


class TorchTrainingModel(TorchEvaluationModel, TrainingModel):
    """A model with gradients and an optimiser."""

    def __init__(
        self,
        ops: TorchOps,
        dtype: str,
        model: Transformer,
        params: Mapping[str, np.ndarray],
        options: TrainingOptions,
        mesh: Mesh | None,
        say: Callable[[str], None] = lambda text: None,
    ):
        super().__init__(ops, dtype, model, params, options, mesh)
        if options.compile:
            compile_blocks(self.module, model)
        held = self.module, self.specs, options.optimizer, self.mesh, ops
        rule = options.optimizer.name
        self.optimizer = Muon(*held, dtype) if rule == "muon" else OPTIMIZERS[rule](*held)
        parameters = self.module.parameters()
        self.run_pass = graphed(self._differentiated, parameters, options, ops.device, self.mesh.world.size, say)
        self.runs_ahead = self.optimizer.refuses and (ops.device.type != "cpu" or self.is_distributed)

    @override
    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        self.module.train()
        if self.is_distributed:
            self.module.set_requires_gradient_sync(is_last)
        terms = self.run_pass(self.on_device(batch), share)
        if is_last:
            sum_over_ranks(self.whole_on_all, self.mesh.world)
        return terms

    def _differentiated(self, batch: Batch, share: float) -> LossTerms:
        terms = self.module(batch)
        (terms.loss if share == 1.0 else terms.loss * share).backward()
        with self.ops.part("optimizer"):
            self.optimizer.watch(terms.loss)
        return terms.map(Tensor.detach)

    @override
    def gradient_norm(self) -> Array:
        with self.ops.part("optimizer"):
            return self.optimizer.gradient_norm()

    @override
    def step(self, learning_rate: float, norm: Array) -> None:
        with self.ops.part("optimizer"):
            self.optimizer.step(learning_rate, norm)
            self.copies.refresh()

    @override
    def gradients(self) -> dict[str, np.ndarray]:
        return self.optimizer.gradients()

    @override
    def optimizer_state(self) -> dict[str, np.ndarray]:
        return self.optimizer.state()

    @override
    def optimizer_shards(self) -> Iterator[Shard]:
        return (part for part in self.optimizer.state_shards() if part.box.size)

    @override
    def load_optimizer_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        self.optimizer.load_state(state, steps)

    @override
    def first_non_finite(self, batch: Batch) -> str | None:
        with torch.no_grad():
            return find_non_finite(
                self.ops,
                self.model,
                self.module.state_dict(),
                self.on_device(batch),
                self.dtype,
                self.gradients(),
            )
