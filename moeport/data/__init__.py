"""From text and images to sequences: sources, tokenizers, packing and order. Imports no framework."""

from moeport.data.domains import Dealing, DomainTokens
from moeport.data.entry import PreparedData
from moeport.data.images import ImageSet, ImageSplit, read_images
from moeport.data.mixture import MixedTokens
from moeport.data.packed import PackedTokens
from moeport.data.prepare import prepare_data
from moeport.data.sampler import Sampler
from moeport.data.tokenizer import Tokenizer, load_tokenizer

Examples = PackedTokens | MixedTokens | ImageSet
"""The data that a run trains on or is evaluated on."""

__all__ = [
    "Dealing",
    "DomainTokens",
    "Examples",
    "ImageSet",
    "ImageSplit",
    "MixedTokens",
    "PackedTokens",
    "PreparedData",
    "Sampler",
    "Tokenizer",
    "load_tokenizer",
    "prepare_data",
    "read_images",
]
