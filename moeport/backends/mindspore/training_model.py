"""A model in training on a MindSpore device: gradients over ranks, and steps of the optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from mindspore import Tensor
from mindspore import ops as msops
from typing_extensions import override

from moeport.backends.base import TrainingModel, TrainingOptions, find_non_finite
from moeport.backends.mindspore.copies import Copies
from moeport.backends.mindspore.device import is_on_cpu
from moeport.backends.mindspore.division import Piece, divide
from moeport.backends.mindspore.graphs import Graphs
from moeport.backends.mindspore.model import MindSporeEvaluationModel
from moeport.backends.mindspore.muon import Muon
from moeport.backends.mindspore.ops import MindSporeOps
from moeport.backends.mindspore.optimizer import AdamW
from moeport.backends.mindspore.placing import fill, on_host
from moeport.comm.mesh import Mesh
from moeport.core.array import Array
from moeport.core.moments import MOMENTS, moment_names, rule_of
from moeport.core.parameters import parameter_dtype
from moeport.core.weights import Box, Shard, run_boxes
from moeport.model.batch import Batch
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer


class MindSporeTrainingModel(MindSporeEvaluationModel, TrainingModel):
    """A model with gradients and an optimiser, whose state is divided among the ranks that hold copies."""

    def __init__(
        self,
        ops: MindSporeOps,
        dtype: str,
        graphs: Graphs | None,
        model: Transformer,
        params: Mapping[str, np.ndarray],
        options: TrainingOptions,
        mesh: Mesh | None,
    ):
        super().__init__(ops, dtype, graphs, model, params, mesh)
        config, specs = options.optimizer, self.specs.values()
        world, copies = self.mesh.world.size, self.mesh.copies.size
        self.rules = {spec.name: rule_of(spec, config.name) for spec in specs}
        buckets = divide(specs, self.shapes, lambda is_expert: copies if is_expert else world, config.name)
        self.copies = Copies(self.mesh, buckets, self.params, options.shard is not False)
        updated = self.copies.updated
        state = (
            {piece.key: piece.count for piece in updated},
            {piece.key: self.specs[piece.name] for piece in updated},
            config,
            parameter_dtype(dtype),
        )
        self.optimizer = Muon(*state, dtype) if config.name == "muon" else AdamW(*state)
        self._accumulated: dict[str, Tensor] = {}
        """Of this rank's micro-batches so far, by parameter."""
        self._summed: dict[str, Tensor] = {}
        """Over all ranks, by the key of what this rank updates; filled after the last micro-batch of a step."""

    @override
    def accumulate(self, batch: Batch, share: float, is_last: bool = True) -> LossTerms:
        terms, gradients = self._run(batch, training=True, share=share)
        new = dict(zip(self.trained, gradients, strict=True))
        present = self._accumulated
        self._accumulated = {name: present[name] + value for name, value in new.items()} if present else new
        if is_last:
            summed, before = self.copies.summed(self._accumulated), self._summed
            self._summed = {key: before[key] + value for key, value in summed.items()} if before else summed
        return terms

    @override
    def gradient_norm(self) -> Array:
        if self.mesh.world.size > 1 and (self.copies.divides or self.mesh.experts.size > 1):
            return self._norm_over_ranks()
        if is_on_cpu():  # its memory is the host's, and numpy is ten times as fast
            arrays = [gradient.asnumpy() for gradient in self._summed.values()]
            return Tensor(np.sqrt(np.sum([np.dot(array, array) for array in arrays])))
        return msops.sqrt(msops.stack([(x * x).sum() for x in self._summed.values()]).sum())

    def _norm_over_ranks(self) -> Tensor:
        """The norm when each rank has gradients that others have not; sums of squares are added in float64."""
        squares, updated = {False: 0.0, True: 0.0}, self.copies.updated
        for piece, square in zip(updated, _squares([self._summed[piece.key] for piece in updated]), strict=True):
            squares[self.specs[piece.name].is_expert] += square
        ranks = self.mesh.world if self.copies.divides else self.mesh.experts
        over = squares[True] + squares[False] * self.copies.divides
        total = ranks.sum_of_numbers(np.array([over]))[0] + squares[False] * (not self.copies.divides)
        return Tensor(np.array(np.sqrt(total), parameter_dtype(self.dtype)))

    @override
    def step(self, learning_rate: float, norm: Tensor) -> None:
        self.optimizer.begin(learning_rate, float(norm.asnumpy()))
        self.copies.update(self._summed, self.optimizer.update)
        self._summed = {}

    @override
    def gradients(self) -> dict[str, np.ndarray]:
        return self._wholes(self._summed, self.trained)

    @override
    def shards(self) -> Iterator[Shard]:
        for _, own in self.copies.written:
            for piece in own:
                yield from self._shards(piece.name, piece, on_host(self.params[piece.name], piece))

    @override
    def optimizer_shards(self) -> Iterator[Shard]:
        for bucket, own in self.copies.written if self.optimizer.steps else ():
            for piece in own if bucket.trainable else ():
                for moment in MOMENTS[self.rules[piece.name]]:
                    array, within = self.copies.held(piece, self.optimizer.moments[moment])
                    yield from self._shards(f"{moment}.{piece.name}", piece, on_host(array, within))

    def _shards(self, name: str, piece: Piece, values: np.ndarray) -> Iterator[Shard]:
        """A piece of a parameter, or of a moment of it with a name of its own, as parts of the whole array."""
        first, whole = 0, self.specs[piece.name].shape
        for box in self._boxes(piece):
            yield Shard(name, whole, box, values[first : first + box.size].reshape(box.shape))
            first += box.size

    def _boxes(self, piece: Piece) -> Iterator[Box]:
        """The parts of the whole parameter that a piece of the local one is."""
        start = self.mesh.box(self.specs[piece.name]).start
        for box in run_boxes(self.shapes[piece.name], piece.first, piece.count, piece.count):
            yield Box(tuple(s + t for s, t in zip(start, box.start, strict=True)), box.shape)

    @override
    def optimizer_state(self) -> dict[str, np.ndarray]:
        if not self.optimizer.steps:
            return {}
        found: dict[str, np.ndarray] = {}
        for moment, arrays in self.optimizer.moments.items():
            names = [name for name in self.trained if moment in MOMENTS[self.rules[name]]]
            found |= {f"{moment}.{name}": value for name, value in self._wholes(arrays, names).items()}
        return {name: found[name] for name in moment_names(list(self.specs.values()), self.optimizer.config.name)}

    def _wholes(self, updated: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, np.ndarray]:
        """Whole arrays with the shapes of parameters, from what each rank updates."""
        local = self.copies.local(updated, list(names))
        return {
            name: self.mesh.whole(self.specs[name], value.reshape(self.shapes[name])) for name, value in local.items()
        }

    @override
    def load_optimizer_state(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        self.optimizer.steps = steps
        kind = parameter_dtype(self.dtype)
        for piece in self.copies.updated:
            for moment in MOMENTS[self.rules[piece.name]]:
                name = f"{moment}.{piece.name}"
                if name in state:
                    fill(self.optimizer.moments[moment][piece.key], state, name, self._boxes(piece), kind)

    @override
    def first_non_finite(self, batch: Batch) -> str | None:
        ops, placed = self.ops, batch.mapped(self.ops.from_numpy)
        return find_non_finite(ops, self.model, self.shaped(), placed, self.dtype, self.gradients())


def _squares(arrays: Sequence[Tensor]) -> list[float]:
    """Sums of squares; an accelerator computes them, and the host waits for it once. That is not run on hardware."""
    if is_on_cpu():
        return [float(np.dot(host, host)) for host in (array.asnumpy() for array in arrays)]
    return msops.stack([(x * x).sum() for x in arrays]).asnumpy().tolist() if arrays else []
