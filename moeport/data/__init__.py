"""Text to token sequences: sources, tokenizers, packing, order. Imports no framework."""

from moeport.data.packed import PackedTokens
from moeport.data.prepare import PreparedData, prepare_data
from moeport.data.sampler import Sampler
from moeport.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["PackedTokens", "PreparedData", "Sampler", "Tokenizer", "load_tokenizer", "prepare_data"]
