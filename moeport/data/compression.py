"""Compression of the same text by general-purpose tools: the bits per byte that a language model should beat."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence

from moeport.data.documents import Document


def compression_baselines(documents: Sequence[Document]) -> dict[str, float]:
    """Bits per UTF-8 byte of `gzip -9` and `xz -9`, with each document compressed separately."""
    texts = [document.text.encode() for document in documents]
    num_bytes = sum(map(len, texts))
    return {
        "gzip": 8 * sum(len(gzip.compress(text, 9)) for text in texts) / num_bytes,
        "xz": 8 * sum(len(lzma.compress(text, preset=9)) for text in texts) / num_bytes,
    }
