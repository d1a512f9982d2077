"""Compression of the same text by general-purpose tools: the bits per byte that a language model should beat."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable

from moeport.data.documents import Document

MAX_BYTES = 2**24
"""Bytes of text after which no further document is compressed: xz takes a second for 2 MB."""


def compression_baselines(documents: Iterable[Document]) -> dict[str, float]:
    """Bits per UTF-8 byte of `gzip -9` and `xz -9`, with each document compressed separately.

    Of more than `MAX_BYTES` of text, the first documents are compressed.
    """
    num_bytes, gzip_bytes, xz_bytes = 0, 0, 0
    for document in documents:
        text = document.text.encode()
        num_bytes += len(text)
        gzip_bytes += len(gzip.compress(text, 9))
        xz_bytes += len(lzma.compress(text, preset=9))
        if num_bytes >= MAX_BYTES:
            break
    return {"gzip": 8 * gzip_bytes / num_bytes, "xz": 8 * xz_bytes / num_bytes}
