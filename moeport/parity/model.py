"""Models under a recorder: the same computation, with names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from typing_extensions import override

from moeport.config.data import DataConfig
from moeport.config.model import ModelConfig
from moeport.core.array import Array
from moeport.core.dispatch import RunExperts, RunPart
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing, SoftRouting
from moeport.model.batch import Batch
from moeport.model.block import Block
from moeport.model.build import build_model
from moeport.model.decoder import DecoderLM
from moeport.model.forward_pass import BlockOutput, Pass
from moeport.model.loss_terms import MEANS, LossTerms
from moeport.model.moe_metrics import MoEMetrics
from moeport.model.transformer import Transformer
from moeport.model.vision import ImageClassifier
from moeport.parity.exchange import LocalExchange, RecordedExchange
from moeport.parity.parts import ROWS
from moeport.parity.recorder import Recorder
from moeport.parity.recording_ops import recorded
from moeport.routers.base import Router

LOSSES = (*MEANS, "loss")
"""Loss terms that are losses."""
COUNTS = ("chosen_LE", "served_LE")
"""Loss terms that count assignments."""


class Recorded(Transformer):
    """A mixin for models whose passes are recorded, on any backend."""

    recorder: Recorder
    inside_blocks: bool

    def record(self, recorder: Recorder, inside_blocks: bool) -> None:
        """Start recording. Call it once.

        Args:
            recorder: takes the records.
            inside_blocks: record every operation of a block. If false, only its output is recorded, so that a backend
                can compile or recompute it; nothing is recorded if the backend compiles more than single blocks.
        """
        self.recorder, self.inside_blocks = recorder, inside_blocks
        if inside_blocks:
            self.blocks = [RecordedBlock(block, recorder) for block in self.blocks]

    def hidden(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> tuple[Array, list[MoEMetrics]]:
        """Also records the output and the metrics of each block; those of a second pass have the prefix `pass2`."""
        recorder, ops = self.recorder, run.ops
        if not self._records(run):
            return super().hidden(run, params, batch)
        recorder.name_arrays("parameter", params)
        noise = {f"noise.{name}": u_BS for name, u_BS in batch.noise.items()}
        optional = {"document_BS": batch.document_BS, "domain_B": batch.domain_B, "weight_BS": batch.weight_BS}
        given_too = {name: array for name, array in optional.items() if array is not None}
        inputs = {"batch": {"token_BS": batch.token_BS, "target_BS": batch.target_BS, **noise, **given_too}}
        inputs["rope"] = {"cos_SA": run.rope[0], "sin_SA": run.rope[1]}
        for scope, arrays in inputs.items():
            with recorder.scope(scope):
                for name, array in arrays.items():
                    recorder.add(ops, name, "input", array)
        given = replace(run, ops=ops.unrecorded())
        recording = replace(run, ops=recorded(ops, recorder), run_block=partial(self._recorded_block, given, params))
        with recorder.scope(f"pass{run.number + 1}") if run.number else nullcontext():
            return super().hidden(recording, params, batch)

    def _recorded_block(
        self, given: Pass, params: Mapping[str, Array], run: Pass, x_BSD: Array, context: RouterContext
    ) -> BlockOutput:
        """Run a block and record its results: as `given` runs blocks, or on `run`, which also records its inside."""
        recorder, ops = self.recorder, given.ops
        given = replace(given, rope=run.rope, document_BS=run.document_BS)
        with recorder.layer(context.layer):
            if given.run_block:
                y_BSD, metrics = given.run_block(given, x_BSD, context)
            else:
                y_BSD, metrics = self._run_block(params, run, x_BSD, context)
            for suffix, layer_metrics in zip(self.blocks[context.layer].moe, metrics, strict=True):
                for name in ("load_balance", "router_z"):
                    loss = getattr(layer_metrics, name)
                    if loss is not None:  # None: it is off
                        recorder.add(ops, name + suffix, "loss", loss)
                for name in ("chosen_E", "served_E"):
                    recorder.add(ops, name + suffix, "plan", getattr(layer_metrics, name))
            recorder.add(ops, "output", "activation", y_BSD)
        return y_BSD, metrics

    def loss(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> LossTerms:
        """The loss terms, which are also recorded."""
        if not self._records(run):
            return super().loss(run, params, batch)
        terms = super().loss(replace(run, ops=recorded(run.ops, self.recorder)), params, batch)
        for name in LOSSES:
            self.recorder.add(run.ops, name, "loss", getattr(terms, name))
        for name in COUNTS:
            self.recorder.add(run.ops, name, "plan", getattr(terms, name))
        return terms

    def _records(self, run: Pass) -> bool:
        return self.recorder.active and (self.inside_blocks or run.run_block is not None)


class RecordedLM(Recorded, DecoderLM):
    """A `DecoderLM` that is recorded. Takes its arguments and those of `Recorded.record`."""

    def __init__(self, config: ModelConfig, vocab_size: int, recorder: Recorder, inside_blocks: bool = True):
        super().__init__(config, vocab_size)
        self.record(recorder, inside_blocks)


class RecordedClassifier(Recorded, ImageClassifier):
    """An `ImageClassifier` that is recorded. Takes the arguments of `Recorded.record`."""

    def __init__(self, model: ImageClassifier, recorder: Recorder, inside_blocks: bool = True):
        super().__init__(model.config, model.num_patches, model.patch_values, model.num_classes)
        self.record(recorder, inside_blocks)


def recorded_model(
    config: ModelConfig, data: DataConfig, vocab_size: int, recorder: Recorder, inside_blocks: bool = True
) -> Recorded:
    """The model of `build_model`, recorded. Takes its arguments and those of `Recorded.record`."""
    model = build_model(config, data, vocab_size)
    if isinstance(model, ImageClassifier):
        return RecordedClassifier(model, recorder, inside_blocks)
    return RecordedLM(config, vocab_size, recorder, inside_blocks)


class RecordedBlock(Block):
    """A block that records its operations."""

    def __init__(self, block: Block, recorder: Recorder):
        super().__init__(block.config, block.layer, block.vocab_size, block.causal)
        self.recorder = recorder
        self.first_expert: int | None = None
        """Index of the first local expert, if experts are recorded from outside; None: each operation is recorded."""
        for suffix, moe in self.moe.items():
            moe.router = RecordedRouter(moe.router, recorder, f"moe{suffix}.router")

    def record_experts_from_outside(self, first_expert: int) -> None:
        """Record of the experts and their exchange only what does not depend on the number of ranks. Call it once.

        Args:
            first_expert: index of this rank's first expert.
        """
        self.first_expert = first_expert
        for moe in self.moe.values():
            moe.exchange = RecordedExchange(moe.exchange or LocalExchange(), self.recorder)

    def forward(
        self,
        run: Pass,
        params: Mapping[str, Array],
        x_BSD: Array,
        context: RouterContext,
        run_experts: Callable[[str], RunExperts] | None = None,
        run_part: Callable[[str], RunPart] | None = None,
    ) -> BlockOutput:
        """Run the block; experts use `params`, so that they are recorded."""
        if self.recorder.active:
            self.recorder.name_arrays("parameter", {f"layers.{self.layer}.{name}": x for name, x in params.items()})
        own = run_experts
        if self.first_expert is not None:
            own = partial(self._run_experts, run.ops.unrecorded(), params, run_experts)
        recording = replace(run, ops=recorded(run.ops, self.recorder))
        return super().forward(recording, params, x_BSD, context, own, run_part)

    def _run_experts(
        self, ops: Ops, params: Mapping[str, Array], given: Callable[[str], RunExperts] | None, suffix: str
    ) -> RunExperts:
        """Run this rank's experts, with weights from `given` or else from `params`, and record the rows of each."""
        first = self.first_expert or 0

        def compute_unrecorded(w_in: Array, w_out: Array, x_RD: Array, counts_E: Array) -> Array:
            name = self.recorder.operation_name(ROWS, [("w_in", w_in), ("w_out", w_out)])
            rows_E = np.zeros(self.config.moe.num_experts, np.int64)
            rows_E[first : first + w_in.shape[0]] = ops.to_numpy(counts_E)
            self.recorder.store(ops, name, "plan", ops.from_numpy(rows_E), ROWS, ())
            return ops.grouped_mlp(x_RD, w_in, w_out, counts_E, self.config.moe.activation)

        def run(compute: Callable[..., Array], *arrays: Array) -> Array:
            if given:
                return given(suffix)(compute_unrecorded, *arrays)
            w_in, w_out = (params[f"moe{suffix}.experts.{name}"] for name in ("w_in", "w_out"))
            return compute_unrecorded(w_in, w_out, *arrays)

        return run


class RecordedRouter(Router[Any]):
    """Any router, with its choices recorded."""

    def __init__(self, router: Router[Any], recorder: Recorder, scope: str):
        super().__init__(router.config, router.d_model, router.num_experts, router.init_std, router.vocab_size)
        self.router, self.recorder, self.scope = router, recorder, scope
        self.noise = router.noise
        self.load_balance = router.load_balance

    @property
    @override
    def gate_dim(self) -> int:
        return self.router.gate_dim

    @override
    def gate_cosines(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        return self.router.gate_cosines(ops, params, x_TD)

    @override
    def parameter_specs(self) -> list[ParameterSpec]:
        return self.router.parameter_specs()

    def route(
        self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext
    ) -> Routing | SoftRouting:
        """The routing, whose experts, gates and scores are also recorded."""
        if not self.recorder.active:
            return self.router.route(ops, params, x_TD, context)
        with self.recorder.scope(self.scope, router=True):
            routing = self.router.route(ops, params, x_TD, context)
            if isinstance(routing, SoftRouting):
                scores: tuple[str, ...] = ("logits_TE", "dispatch_BSR", "combine_BSR")
            else:
                scores = ("logits_TE", "probs_TE", "weight_N")
                self._add_choices(ops, routing)
            for name in scores:
                self.recorder.add(ops, name, "score", getattr(routing, name))
        return routing

    def _add_choices(self, ops: Ops, routing: Routing) -> None:
        """Record the experts of each token in order or, if experts choose tokens, the tokens that each expert took."""
        if routing.token_N is None:
            self.recorder.add(ops, "expert_N", "plan", routing.expert_N)
            return
        shape = (routing.num_tokens, routing.num_experts)
        inner = ops.unrecorded()
        pair_N = routing.token_N * inner.index(shape[1]) + routing.expert_N
        self.recorder.add(ops, "taken_TE", "plan", inner.reshape(inner.bincount(pair_N, shape[0] * shape[1]), shape))

    @override
    def update_state(self, state: Mapping[str, np.ndarray], load_E: np.ndarray) -> dict[str, np.ndarray]:
        return self.router.update_state(state, load_E)
