"""The decoder language model. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Mapping

from typing_extensions import override

from moeport.config.model import ModelConfig, ParameterCounts
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.model.batch import Batch
from moeport.model.forward_pass import Pass
from moeport.model.transformer import Transformer


class DecoderLM(Transformer):
    """The decoder language model: each token predicts the next.

    Args:
        config: the `model` section.
        vocab_size: rows of the embedding V.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.vocab_size = config.vocab_size or vocab_size
        super().__init__(config, self.vocab_size, causal=True)

    @override
    def parameter_counts(self) -> ParameterCounts:
        return self.config.parameter_counts(self.vocab_size)

    @override
    def training_flops_per_token(self, sequence_length: int) -> int:
        return self.config.training_flops_per_token(self.vocab_size, sequence_length)

    @override
    def embedding_specs(self) -> list[ParameterSpec]:
        std = self.config.embedding_std or self.config.init_std
        return [ParameterSpec("embedding.weight", (self.vocab_size, self.config.d_model), std=std)]

    @override
    def head_specs(self) -> list[ParameterSpec]:
        config = self.config
        head = ParameterSpec("lm_head.weight", (self.vocab_size, config.d_model), std=config.init_std)
        return [] if config.tie_embeddings else [head]

    @override
    def embed(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> Array:
        return run.ops.cast(run.ops.take_rows(params["embedding.weight"], batch.token_BS), run.dtype)

    @override
    def token_ids(self, ops: Ops, batch: Batch[Array]) -> Array:
        return ops.reshape(batch.token_BS, (-1,))

    def features(self, ops: Ops, x_BSD: Array) -> Array:
        """`x_BSD` itself: every position predicts."""
        return x_BSD

    @override
    def head(self, params: Mapping[str, Array]) -> Array:
        return params["embedding.weight" if self.config.tie_embeddings else "lm_head.weight"]
