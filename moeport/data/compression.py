"""Compression of the same text by general-purpose tools: the bits per byte that a language model should beat."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable

from moeport.data.documents import Document

MAX_BYTES = 2**24
"""Bytes of text after which no further document is compressed: xz takes a second for 2 MB."""
MIN_DICTIONARY, MAX_DICTIONARY = 2**12, 2**26
"""Bytes of the dictionary of xz: the least it takes, and that of `xz -9`."""


def compression_baselines(documents: Iterable[Document]) -> dict[str, float]:
    """Bits per UTF-8 byte of `gzip -9` and `xz -9`, with each document compressed separately.

    Of more than `MAX_BYTES` of text, the first documents are compressed.
    """
    num_bytes, gzip_bytes, xz_bytes = 0, 0, 0
    for document in documents:
        text = document.text.encode()
        num_bytes += len(text)
        gzip_bytes += len(gzip.compress(text, 9))
        xz_bytes += len(_xz(text))
        if num_bytes >= MAX_BYTES:
            break
    return {"gzip": 8 * gzip_bytes / num_bytes, "xz": 8 * xz_bytes / num_bytes}


def _xz(text: bytes) -> bytes:
    """`xz -9` with a dictionary no larger than the text needs: clearing one of 64 MiB takes 50 ms for each document."""
    dictionary = min(max(MIN_DICTIONARY, 1 << (len(text) - 1).bit_length()), MAX_DICTIONARY)
    return lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])
