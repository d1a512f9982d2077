"""Byte-level tokenizers: BPE, Scaffold-BPE (2404.17808) and LBPE (2411.05504)."""

from moeport.tokenizers.longest import longest_first
from moeport.tokenizers.pretokens import count_words
from moeport.tokenizers.training import train
from moeport.tokenizers.training_choices import Choices
from moeport.tokenizers.vocabulary import Vocabulary

__all__ = ["Choices", "Vocabulary", "count_words", "longest_first", "train"]
