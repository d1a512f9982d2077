"""A model on a MindSpore device: its parameters, losses and gradients; compiled or operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore import ops as msops
from typing_extensions import override

from moeport.backends.base import EvaluationModel
from moeport.backends.mindspore.expert_rows import ExpertRows
from moeport.backends.mindspore.graphs import Graphs
from moeport.backends.mindspore.ops import MindSporeOps
from moeport.backends.mindspore.placing import fill, placed
from moeport.backends.mindspore.trace import compiled
from moeport.comm.mesh import Mesh, single_mesh
from moeport.core.parameters import parameter_dtype
from moeport.model.batch import Batch
from moeport.model.cache import NewTokens
from moeport.model.decoding import next_scores
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer

BatchForm = tuple[tuple[int, ...], tuple[str, ...], bool, bool, bool]
"""The shape (B, S), or (B, S, P) for patches, the names of the noise arrays, and whether there are documents, domains
and weights."""


class MindSporeEvaluationModel(EvaluationModel):
    """Parameters as one-dimensional MindSpore tensors, and the model as a pure function of them and a batch.

    Args:
        ops: operations outside graphs.
        dtype: compute type.
        graphs: how to compile; None: operation by operation.
        model: shapes and forward pass.
        params: whole parameters by name, of which only the local parts are read.
        mesh: the ranks that hold the model together; None: only this process.
    """

    ops: MindSporeOps

    def __init__(
        self,
        ops: MindSporeOps,
        dtype: str,
        graphs: Graphs | None,
        model: Transformer,
        params: Mapping[str, np.ndarray],
        mesh: Mesh | None = None,
    ):
        self.ops, self.dtype, self.model = ops, dtype, model
        self.mesh = mesh or single_mesh(ops)
        self.specs = {spec.name: spec for spec in model.parameter_specs()}
        self.trained = [name for name, spec in self.specs.items() if spec.trainable]
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the local parameters."""
        self.params: dict[str, Parameter] = {}
        self._load(params, self.specs)
        self.graphs = None if _communicates(model) else graphs
        self._rows: dict[tuple[Any, ...], ExpertRows] = {}
        self._functions: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @override
    def evaluate(self, batch: Batch) -> LossTerms:
        return self._run(batch, training=False)

    @override
    def logits(self, token_BS: np.ndarray) -> np.ndarray:
        """Never compiled, since each length would need a graph."""
        ops, dtype = self.ops, self.dtype
        run, ids = self.model.forward_pass(ops, token_BS.shape[1], dtype), ops.from_numpy(token_BS)
        return ops.to_numpy(self.model.logits(run, self.shaped(), Batch(ids, ids)))

    @override
    def token_losses(self, batch: Batch) -> np.ndarray:
        """Never compiled, as `logits`."""
        run = self.model.forward_pass(self.ops, batch.token_BS.shape[1], self.dtype)
        return self.ops.to_numpy(self.model.token_losses(run, self.shaped(), batch.mapped(self.ops.from_numpy)))

    @override
    def read(self, new: NewTokens) -> np.ndarray:
        """Never compiled, as `logits`."""
        return self.ops.to_numpy(next_scores(self.model, self.ops, self.dtype, self.shaped(), new))

    @override
    def parameters(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        wanted = self.params if names is None else names
        return {name: self._whole(name, self.params[name]) for name in wanted}

    @override
    def load_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        self._load(params, params)

    def _load(self, params: Mapping[str, np.ndarray], names: Iterable[str]) -> None:
        """Make or replace parameters with these names from the local part of each."""
        kind = parameter_dtype(self.dtype)
        for name in names:
            box = self.mesh.box(self.specs[name])
            if name not in self.params:
                self.shapes[name] = box.shape
                self.params[name] = placed(name, box.size, kind, requires_grad=name in self.trained)
            fill(self.params[name], params, name, [box], kind)

    def _whole(self, name: str, x: Tensor) -> np.ndarray:
        """The whole of a parameter, or of an array with its shape, from the parts on the ranks."""
        return self.mesh.whole(self.specs[name], x.asnumpy().reshape(self.shapes[name]).copy())

    def shaped(self) -> dict[str, Tensor]:
        """Parameters by name, in their shapes."""
        return {name: msops.reshape(value, self.shapes[name]) for name, value in self.params.items()}

    def _run(self, batch: Batch, training: bool, share: float = 1.0) -> Any:
        """Run a batch, and again with more rows per expert if there were too few.

        Returns: loss terms; in training, loss terms and the gradients of the trained parameters.
        """
        inputs = [self.ops.from_numpy(x.reshape(-1)) for x in batch.arrays]
        arrays = [*self.params.values(), *inputs, Tensor(np.array([share], parameter_dtype(self.dtype)))]
        shape = batch.token_BS.shape
        has = (x is not None for x in (batch.document_BS, batch.domain_B, batch.weight_BS))
        form = shape, tuple(batch.noise), *has
        if self.graphs is None:
            return self._function(form, training, None)(*arrays)
        moe = self.model.config.moe
        passes = moe.router.passes if training else 1  # the loads add up over them
        sequences, length = shape[:2]
        assignments = passes * moe.router.assignments(sequences * length, moe.num_experts, sequences)
        rows = self._rows.setdefault((training, shape), ExpertRows(moe, assignments, training))
        while True:
            out = self._function(form, training, rows.size)(*arrays)
            terms = out[0] if training else out
            if rows.fits(int(terms.served_LE.asnumpy().max())):
                return out

    def _function(self, form: BatchForm, training: bool, rows: int | None) -> Callable[..., Any]:
        """The loss, or in training the loss and its gradients, as a function of the arrays of `_run`.

        Args:
            form: of the batch.
            training: as in `_run`.
            rows: rows per expert in a compiled graph; None: not compiled.
        """
        key = (form, training, rows)
        if key not in self._functions:
            graphs = self.graphs if rows else None
            ops = graphs.ops(rows, training) if graphs and rows else self.ops

            measured: list[str] = []

            def loss(*arrays: Tensor) -> tuple[Tensor, ...]:
                return self._loss(ops, form, training, measured, *arrays)

            if graphs:
                loss = compiled(loss, graphs.compilations)
            self._functions[key] = (
                partial(_gradients, self._differentiate(loss), measured)
                if training
                else partial(_terms, loss, measured)
            )
        return self._functions[key]

    def _loss(
        self, ops: MindSporeOps, form: BatchForm, training: bool, measured: list[str], *arrays: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss times the last array, which is the share of the micro-batch, and all loss terms.

        The names of what the layers measure are put into `measured`.
        """
        dtype, (shape, noise, has_documents, has_domains, has_weights) = self.dtype, form
        rest = iter(arrays)
        params = {name: msops.reshape(next(rest), self.shapes[name]) for name in self.params}
        tokens, targets, *drawn, share = rest
        weights = msops.reshape(drawn.pop(), shape[:2]) if has_weights else None
        domains = drawn.pop() if has_domains else None
        documents = msops.reshape(drawn.pop(), shape[:2]) if has_documents else None
        batch = Batch(
            msops.reshape(tokens, shape),
            msops.reshape(targets, (shape[0], -1)),
            {name: msops.reshape(u, shape[:2]) for name, u in zip(noise, drawn, strict=True)},
            documents,
            domains,
            weights,
        )
        terms = self.model.loss(self.model.forward_pass(ops, shape[1], dtype, training), params, batch)
        measured[:] = terms.measured
        scaled = terms.loss * ops.cast(msops.reshape(share, ()), ops.dtype(terms.loss))
        return scaled, *map(ops.stop_gradient, terms.flat())

    def _differentiate(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        positions = tuple(i for i, name in enumerate(self.params) if name in self.trained)
        return ms.value_and_grad(loss, positions, None, has_aux=True)


def _terms(loss: Callable[..., Any], measured: list[str], *arrays: Tensor) -> LossTerms:
    return LossTerms.from_flat(loss(*arrays)[1:], measured)


def _gradients(
    differentiated: Callable[..., Any], measured: list[str], *arrays: Tensor
) -> tuple[LossTerms, tuple[Tensor, ...]]:
    (_, *terms), gradients = differentiated(*arrays)
    return LossTerms.from_flat(terms, measured), gradients


def _communicates(model: Transformer) -> bool:
    """Whether a pass of the model communicates with other ranks, which a compiled graph cannot."""
    balances_over_ranks = model.config.moe.load_balance.scope == "global"
    return any(
        layer.exchange is not None or (layer.mean_over_ranks is not None and balances_over_ranks)
        for layer in model.moe_layers.values()
    )
