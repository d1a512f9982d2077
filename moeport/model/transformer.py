"""What every model shares: blocks between an embedding and a head, as pure functions of operations, parameters and a
batch. Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from moeport.config.model import ModelConfig, ParameterCounts
from moeport.core.array import Array
from moeport.core.losses import symmetric_divergence, weighted_cross_entropy
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec, noise_rows, subtree, with_prefix
from moeport.core.routing import RouterContext, Topology
from moeport.model import rope
from moeport.model.batch import Batch
from moeport.model.block import Block
from moeport.model.forward_pass import BlockOutput, Pass
from moeport.model.loss_terms import COUNTS, MEANS, SEQUENCE_NATS, LossTerms
from moeport.model.moe import MoELayer
from moeport.model.moe_metrics import MoEMetrics, mean_over_layers, stacked_layers

SCORED_LOGITS = 2**24
"""Logits that exist at a time where the loss of each token is wanted: 64 MiB in float32."""


class Transformer(ABC):
    """What every model shares: blocks between an embedding and a head. Shapes and forward pass; holds no arrays.

    Args:
        config: the `model` section.
        vocab_size: V, for routers that look at token ids; None if there are none.
        causal: whether a position sees only itself and earlier ones.
    """

    def __init__(self, config: ModelConfig, vocab_size: int | None, causal: bool):
        self.config = config
        self.blocks = [Block(config, layer, vocab_size, causal) for layer in range(config.num_layers)]
        self.topology = Topology()
        """Where this process and the experts are."""
        self.keeps_choices = False
        """Whether training keeps the routers' choices for the trainer; see `moeport.model.loss_terms.KEPT`."""

    @property
    def moe_layers(self) -> dict[str, MoELayer]:
        """Every MoE layer by the prefix of its parameters' names, in the order of execution."""
        return {f"layers.{block.layer}.moe{suffix}": moe for block in self.blocks for suffix, moe in block.moe.items()}

    @property
    def is_incremental(self) -> bool:
        """Whether what a token gives depends only on itself and the tokens before it, in evaluation.

        It does not if a router looks ahead, or a capacity drops what has no room beside other tokens.
        """
        moe = self.config.moe
        return not self.moe_layers or not (moe.router.looks_ahead or moe.capacity.has_limit)

    @abstractmethod
    def parameter_counts(self) -> ParameterCounts:
        """Numbers of trained parameters."""

    @abstractmethod
    def training_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of one token's forward and backward pass, counted as PaLM does."""

    @abstractmethod
    def embedding_specs(self) -> list[ParameterSpec]:
        """Parameters of `embed`."""

    @abstractmethod
    def head_specs(self) -> list[ParameterSpec]:
        """Parameters of the head that it does not share with the embedding."""

    @abstractmethod
    def embed(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> Array:
        """Input of the first block (B, S, D) in the compute type. Arguments as in `hidden`."""

    @abstractmethod
    def token_ids(self, ops: Ops, batch: Batch[Array]) -> Array | None:
        """Vocabulary ids (T,); None if there are none."""

    @abstractmethod
    def features(self, ops: Ops, x_BSD: Array) -> Array:
        """What the head reads, from the output of `hidden`: one vector (..., D) per target."""

    @abstractmethod
    def head(self, params: Mapping[str, Array]) -> Array:
        """The output projection (V, D), where V counts vocabulary ids or classes."""

    def parameter_specs(self) -> list[ParameterSpec]:
        """All parameters; their names are the checkpoint's names."""
        specs = self.embedding_specs()
        for block in self.blocks:
            specs += with_prefix(f"layers.{block.layer}", block.parameter_specs())
        specs.append(ParameterSpec("final_norm.weight", (self.config.d_model,), "ones"))
        return specs + self.head_specs()

    def noise(
        self, batch_size: int, sequence_length: int, seed: int, step: int, first: int = 0
    ) -> dict[str, np.ndarray]:
        """Routing noise (B, S) of sequences of one step, float32; no others are drawn.

        Args:
            batch_size: B, the number of sequences.
            sequence_length: S.
            seed: seed of the run.
            step: number of the step.
            first: position of the first of them in the batch of all ranks.
        """
        rows = range(first, first + batch_size)
        return {
            f"{block.layer}.{name}": noise_rows(name, rows, sequence_length, seed, "noise", step, block.layer)
            for block in self.blocks
            for suffix, moe in block.moe.items()
            for name in (f"{suffix}.{plain}" if suffix else plain for plain in moe.noise)
        }

    def rope(self, ops: Ops, sequence_length: int, dtype: str) -> tuple[Array, Array]:
        """Rotary tables as of `rope.of_config` on the device, in float32 or wider."""
        cos, sin = rope.of_config(self.config, sequence_length, "float32" if dtype == "bfloat16" else dtype)
        return ops.from_numpy(cos), ops.from_numpy(sin)

    def forward_pass(self, ops: Ops, sequence_length: int, dtype: str, training: bool = False) -> Pass:
        """A pass over sequences of one length, with its rotary tables. Arguments as in `Pass`."""
        return Pass(ops, dtype, self.rope(ops, sequence_length, dtype), training)

    def hidden(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> tuple[Array, list[MoEMetrics]]:
        """Normalised hidden states of the last block.

        Args:
            run: how the pass is computed.
            params: all parameters by name; with `run.run_block`, those outside the blocks suffice.
            batch: arrays of the backend, of the sequence length of `run.rope`; targets are not read.

        Returns: (x_BSD in the compute type, metrics per MoE layer).
        """
        run = _within_documents(run, batch)
        ops, run_block = run.ops, run.run_block or partial(self._run_block, params)
        token_ids_T, position_T, first_id_T = self.token_ids(ops, batch), None, None
        if run.continuation is not None:
            position_T, first_id_T = (
                ops.reshape(x_BQ, (-1,)) for x_BQ in (run.continuation.position_BQ, run.continuation.first_id_BQ)
            )
        with ops.part("embedding"):
            x_BSD = self.embed(run, params, batch)
        metrics: list[MoEMetrics] = []
        for block in self.blocks:
            prefix = f"{block.layer}."
            noise = {
                name[len(prefix) :]: ops.reshape(noise_BS, (-1,))
                for name, noise_BS in batch.noise.items()
                if name.startswith(prefix)
            }
            sequences = batch.token_BS.shape[0]
            context = RouterContext(
                block.layer,
                run.training,
                token_ids_T,
                noise,
                num_sequences=sequences,
                topology=self.topology,
                pass_number=run.number,
                position_T=position_T,
                first_id_T=first_id_T,
                domain_B=batch.domain_B,
                keeps_choices=self.keeps_choices and run.training,
            )
            with ops.part("block"):
                x_BSD, block_metrics = run_block(run.in_block(block.layer), x_BSD, context)
            metrics += block_metrics
        return ops.rms_norm(x_BSD, params["final_norm.weight"], self.config.norm_eps), metrics

    def _run_block(self, params: Mapping[str, Array], run: Pass, x_BSD: Array, context: RouterContext) -> BlockOutput:
        return self.blocks[context.layer].forward(run, subtree(f"layers.{context.layer}", params), x_BSD, context)

    def logits(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> Array:
        """Scores per target in the compute type, with training off: next-token scores (B, S, V), or class scores
        (B, V). Arguments as in `hidden`.
        """
        x_BSD, _ = self.hidden(replace(run, training=False), params, batch)
        return run.ops.linear(self.features(run.ops, x_BSD), self.head(params))

    def token_losses(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> Array:
        """Negative log-likelihood of each target in nats (B, S), with training off. Arguments as in `hidden`.

        As many logits exist at a time as SCORED_LOGITS says, but those of one token at least.
        """
        ops, (sequences, length) = run.ops, batch.target_BS.shape
        x_BSD, _ = self.hidden(replace(run, training=False), params, batch)
        x_TD = ops.reshape(self.features(ops, x_BSD), (-1, self.config.d_model))
        target_T, head_VD = ops.reshape(batch.target_BS, (-1,)), self.head(params)
        tokens = max(1, SCORED_LOGITS // head_VD.shape[0])
        parts = [
            ops.cross_entropy(ops.linear(x_TD[start : start + tokens], head_VD), target_T[start : start + tokens])[0]
            for start in range(0, sequences * length, tokens)
        ]
        return ops.reshape(ops.concat(parts, axis=0), (sequences, length))

    def loss(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> LossTerms:
        """Mean cross entropy plus weighted auxiliary losses. Arguments as in `hidden`.

        If the router needs two passes in training, the sum of their losses and the weighted divergence of their
        outputs. Of the other terms, counts are added and the rest averaged.
        """
        ops, router = run.ops, self.config.moe.router

        def run_pass(number: int) -> tuple[Array, LossTerms]:
            x_BSD, layers = self.hidden(replace(run, number=number), params, batch)
            with ops.part("loss"):
                x_TD = ops.reshape(self.features(ops, x_BSD), (-1, self.config.d_model))
                return x_TD, self._terms(ops, params, batch, x_TD, layers)

        x_TD, terms = run_pass(0)
        if router.passes == 1 or not run.training:
            return terms
        y_TD, others = run_pass(1)
        with ops.part("loss"):
            half = ops.constant_like(0.5, terms.loss)
            loss = terms.loss + others.loss
            if router.consistency_weight:
                divergence = symmetric_divergence(ops, *(ops.linear(z_TD, self.head(params)) for z_TD in (x_TD, y_TD)))
                loss = loss + divergence * ops.constant_like(router.consistency_weight, loss)
            return terms._replace(
                loss=loss,
                **{name: getattr(terms, name) + getattr(others, name) for name in COUNTS},
                **{name: (getattr(terms, name) + getattr(others, name)) * half for name in MEANS},
                measured={name: ops.concat([x, others.measured[name]], axis=0) for name, x in terms.measured.items()},
            )

    def _terms(
        self, ops: Ops, params: Mapping[str, Array], batch: Batch[Array], x_TD: Array, layers: list[MoEMetrics]
    ) -> LossTerms:
        """The loss of one pass, from what the head reads and the metrics of the layers."""
        target_T, weight_BS = ops.reshape(batch.target_BS, (-1,)), batch.weight_BS
        head_VD, z_weight = self.head(params), self.config.output_z_loss
        measured = {name: _stack_layers(ops, [m.measured[name] for m in layers]) for name in layers[0].measured}
        if weight_BS is None:
            loss, cross_entropy, output_z = ops.linear_cross_entropy(x_TD, head_VD, target_T, z_weight)
        else:
            weight_T = ops.reshape(weight_BS, (-1,))
            loss, nll_T, output_z = weighted_cross_entropy(ops, x_TD, head_VD, target_T, weight_T, z_weight)
            cross_entropy = ops.mean(nll_T)
            measured[SEQUENCE_NATS] = ops.reshape(ops.sum(ops.reshape(nll_T, weight_BS.shape), axis=1), (1, -1))
        kind, experts = ops.dtype(loss), self.config.moe.num_experts
        for layer, metrics in zip(self.moe_layers.values(), layers, strict=True):
            if metrics.has_losses:
                loss = loss + layer.auxiliary_loss(ops, metrics)
        return LossTerms(
            loss=loss,
            cross_entropy=cross_entropy,
            load_balance=mean_over_layers(ops, [m.load_balance for m in layers], kind),
            router_z=mean_over_layers(ops, [m.router_z for m in layers], kind),
            output_z=output_z,
            chosen_LE=stacked_layers(ops, [m.chosen_E for m in layers], (experts,), kind),
            served_LE=stacked_layers(ops, [m.served_E for m in layers], (experts,), kind),
            capacity_L=stacked_layers(ops, [m.capacity for m in layers], (), kind),
            positions_L2P=stacked_layers(ops, [m.positions_2P for m in layers], (2, 1), kind),
            affinity_L4E=stacked_layers(ops, [m.affinity_4E for m in layers], (4, experts), kind),
            measured=measured,
        )

    def router_state_names(self) -> list[str]:
        """Untrained parameters that routers and capacities update after each step."""
        return [spec.name for spec in self.parameter_specs() if spec.is_state]

    def updated_state(
        self, state: Mapping[str, np.ndarray], chosen_LE: np.ndarray, affinity_L4E: np.ndarray
    ) -> dict[str, np.ndarray]:
        """New values of the untrained parameters after an optimiser step.

        Args:
            state: their current values by full name.
            chosen_LE: assignments of the whole step, one row per MoE layer.
            affinity_L4E: the loss term of that name, summed over the whole step.
        """
        updates: dict[str, np.ndarray] = {}
        for (prefix, moe), chosen_E, affinity_4E in zip(self.moe_layers.items(), chosen_LE, affinity_L4E, strict=True):
            new = moe.updated_state(subtree(prefix, state), chosen_E, affinity_4E)
            updates |= {f"{prefix}.{name}": value for name, value in new.items()}
        return updates


def _within_documents(run: Pass, batch: Batch[Array]) -> Pass:
    """The pass over a batch whose documents do not see each other: the angles are those of a position's distance from
    the beginning of its document.
    """
    if batch.document_BS is None:
        return run
    position_BS = run.ops.arange(batch.document_BS.shape[1]) - batch.document_BS
    cos, sin = (run.ops.take_rows(table_SA, position_BS) for table_SA in run.rope)
    return replace(run, rope=(cos, sin), document_BS=batch.document_BS)


def _stack_layers(ops: Ops, layers: list[Array]) -> Array:
    """The values of one pass, one per layer, as (1, L, ...)."""
    return ops.concat([ops.reshape(x, (1, 1, *x.shape)) for x in layers], axis=1)
