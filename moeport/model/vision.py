"""The image classifier: a vision transformer with mixture-of-experts blocks.

Shape suffixes as in `moeport.core.ops`; P pixels per patch, C classes.
"""

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


class ImageClassifier(Transformer):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) without a class token: tokens are patches, every
    patch sees every other, and the class is read from the mean over the patches (Beyer et al. 2022, arXiv 2205.01580).

    Position embeddings are learned and added to the patches; queries and keys are also rotated by the index of the
    patch, as in the language model.

    Args:
        config: the `model` section.
        num_patches: patches per image S.
        patch_values: pixels per patch P.
        num_classes: C.
    """

    def __init__(self, config: ModelConfig, num_patches: int, patch_values: int, num_classes: int):
        self.num_patches, self.patch_values, self.num_classes = num_patches, patch_values, num_classes
        super().__init__(config, vocab_size=None, causal=False)

    @override
    def parameter_counts(self) -> ParameterCounts:
        blocks = self.config.block_counts
        ends = (self.patch_values + self.num_patches + self.num_classes + 1) * self.config.d_model
        return ParameterCounts(ends + blocks.total, ends + blocks.active)

    @override
    def training_flops_per_token(self, sequence_length: int) -> int:
        """The head runs once per image."""
        ends = 6 * self.config.d_model * (self.patch_values + self.num_classes / sequence_length)
        return self.config.block_flops_per_token(sequence_length) + round(ends)

    @override
    def embedding_specs(self) -> list[ParameterSpec]:
        width, std = self.config.d_model, self.config.init_std
        return [
            ParameterSpec("patch_embedding.weight", (width, self.patch_values), std=std, in_compute_type=True),
            ParameterSpec("position_embedding.weight", (self.num_patches, width), std=std, in_compute_type=True),
        ]

    @override
    def head_specs(self) -> list[ParameterSpec]:
        return [ParameterSpec("class_head.weight", (self.num_classes, self.config.d_model), std=self.config.init_std)]

    @override
    def embed(self, run: Pass, params: Mapping[str, Array], batch: Batch[Array]) -> Array:
        ops = run.ops
        position_SD = ops.cast(params["position_embedding.weight"], run.dtype)
        return ops.linear(ops.cast(batch.token_BS, run.dtype), params["patch_embedding.weight"]) + position_SD

    def token_ids(self, ops: Ops, batch: Batch[Array]) -> None:
        """None: a patch has no id."""
        return

    def features(self, ops: Ops, x_BSD: Array) -> Array:
        """The mean over the patches (B, D)."""
        return ops.mean(x_BSD, axis=1)

    @override
    def head(self, params: Mapping[str, Array]) -> Array:
        return params["class_head.weight"]
