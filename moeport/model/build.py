"""The model that a config describes."""

from __future__ import annotations

from moeport.config.data import DIGITS_CLASSES, DataConfig, DigitsSource
from moeport.config.model import ModelConfig
from moeport.model.decoder import DecoderLM
from moeport.model.transformer import Transformer
from moeport.model.vision import ImageClassifier


def build_model(config: ModelConfig, data: DataConfig, vocab_size: int) -> Transformer:
    """A classifier if the data are images, otherwise a language model over `vocab_size` tokens."""
    source = data.source
    if isinstance(source, DigitsSource):
        return ImageClassifier(config, source.num_patches, source.patch_values, DIGITS_CLASSES)
    return DecoderLM(config, vocab_size)
